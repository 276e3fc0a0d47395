"""The losses of training: distillation (SAK), alignment (KPU), and tasks with labels."""

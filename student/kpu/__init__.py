"""KPU: knowledge preservation and unification (Huang et al., Seeing Further on the Shoulders of Giants)."""

"""The consumer of a cache: students, losses and the trainer.

from teachercache import build_student, load_student
student = load_student("runs/sak/student")
predictions = student(student.normalize(images))     uint8 (B, 3, H, W) → {task: (B, channels, H, W)}
                                                     or, of stage 1, {teacher: [4 × (B, C, h, w)]},
                                                     of a KPU {teacher: [(B, C, H, W)]}
"""

if __name__ == "student":
    raise ImportError("`student` is imported as `teachercache.student`")

from teachercache.pipeline.lazy_names import lazy

_HOMES = {
    "Amalgam": "models.amalgam",
    "KPU": "kpu.model",
    "SAK": "sak.model",
    "Student": "models.student",
    "StudentOutput": "models.student",
    "build_student": "build",
    "load_reference": "sak.reference",
    "load_stage_1": "sak.transfer",
    "load_student": "build",
    "push_to_hub": "hub",
    "read_reference": "sak.reference",
}
__getattr__ = lazy(__name__, _HOMES)
__all__ = [*_HOMES]

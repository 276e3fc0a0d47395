"""The consumer of a cache: students, losses and the trainer.

from teachercache import build_student, load_student
student = load_student("runs/sak/student")
predictions = student(student.normalize(images))     uint8 (B, 3, H, W) → {task: (B, channels, H, W)}
                                                     or, of stage 1, {teacher: [4 × (B, C, h, w)]},
                                                     of a KPU {teacher: [(B, C, H, W)]}
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ == "student":
    raise ImportError("`student` is imported as `teachercache.student`")

if TYPE_CHECKING:
    from teachercache.student.build import build_student, load_student
    from teachercache.student.hub import push_to_hub
    from teachercache.student.kpu.model import KPU
    from teachercache.student.models.amalgam import Amalgam
    from teachercache.student.models.student import Student, StudentOutput
    from teachercache.student.sak.model import SAK
    from teachercache.student.sak.reference import load_reference, read_reference
    from teachercache.student.sak.transfer import load_stage_1

_HOMES = {
    "Amalgam": "teachercache.student.models.amalgam",
    "KPU": "teachercache.student.kpu.model",
    "SAK": "teachercache.student.sak.model",
    "Student": "teachercache.student.models.student",
    "StudentOutput": "teachercache.student.models.student",
    "build_student": "teachercache.student.build",
    "load_reference": "teachercache.student.sak.reference",
    "load_stage_1": "teachercache.student.sak.transfer",
    "load_student": "teachercache.student.build",
    "push_to_hub": "teachercache.student.hub",
    "read_reference": "teachercache.student.sak.reference",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "KPU",
    "SAK",
    "Amalgam",
    "Student",
    "StudentOutput",
    "build_student",
    "load_reference",
    "load_stage_1",
    "load_student",
    "push_to_hub",
    "read_reference",
]

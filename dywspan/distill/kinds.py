"""The kinds of solvers that can be learned."""

from __future__ import annotations

from .lift import LiftStudent
from .student import ContinuousStudent, Student, TableStudent

# By solver, and by whether one function is learned for every number of steps.
STUDENTS: dict[tuple[str, bool], type[Student]] = {
    ("dyweight", False): TableStudent,
    ("dyweight", True): ContinuousStudent,
    ("spanlift", False): LiftStudent,
    ("spanlift", True): LiftStudent,
}

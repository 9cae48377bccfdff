"""The kinds of solvers that can be learned."""

from __future__ import annotations

from .lift import LiftStudent
from .student import ContinuousStudent, Student, TableStudent
from .time_lift import TimeStudent

# By solver, and by whether one function is learned for every number of steps.
STUDENTS: dict[tuple[str, bool], type[Student]] = {
    ("dyweight", False): TableStudent,
    ("dyweight", True): ContinuousStudent,
    ("spanlift", False): LiftStudent,
    ("spanlift", True): LiftStudent,
    ("timelift", False): TimeStudent,
}

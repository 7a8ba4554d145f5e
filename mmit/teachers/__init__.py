"""Teachers: models that write instructions, outputs and scores, behind one interface with a journal and a ledger.

`open_teachers(described)` opens a local model, an OpenAI-compatible endpoint or a recorded journal; `Desk` asks them,
writes every request and reply to one append-only file, and counts tokens and cost.
"""

from mmit.teachers.desk import BudgetError, Desk
from mmit.teachers.journal import Journal
from mmit.teachers.load import open_teachers
from mmit.teachers.request import Draw, Reply, Request, Teacher

__all__ = ["BudgetError", "Desk", "Draw", "Journal", "Reply", "Request", "Teacher", "open_teachers"]

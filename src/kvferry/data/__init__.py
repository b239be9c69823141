"""Questions of one's own, read in one place for all commands: ``--data FILE``.

Neither torch nor transformers is imported here: a mistake in a file is answered before a model is loaded.
"""

from kvferry.data.files import rows_of
from kvferry.data.questions import FIELDS, Asked, Questions, read_questions

__all__ = ["FIELDS", "Asked", "Questions", "read_questions", "rows_of"]

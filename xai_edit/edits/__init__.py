"""ModelEdit, a reversible difference of parameters."""

from xai_edit.edits.model_edit import Change, ModelEdit

__all__ = ["Change", "ModelEdit"]

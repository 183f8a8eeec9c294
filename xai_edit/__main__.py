"""``python -m xai_edit`` is ``xai-edit``."""

from xai_edit.command.main import main

if __name__ == "__main__":
    raise SystemExit(main())

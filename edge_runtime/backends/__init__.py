"""Who executes a Program. A backend is one file of this folder; `protocol.py` says what it must offer."""

"""Programs for another environment: they cannot be imported here."""

collect_ignore = ["browser.py", "chatting.py", "grpcing.py"]

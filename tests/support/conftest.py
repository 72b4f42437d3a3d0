"""browser.py is a program for another environment: it cannot be imported here."""

collect_ignore = ["browser.py", "chatting.py"]

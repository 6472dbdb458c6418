"""One module per stage; each has ``run(params) -> str``, which returns what to tell the user."""

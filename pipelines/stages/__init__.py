"""One module per stage; each has ``run(params)`` and knows paths, not methods."""

"""Speed, memory and detection figures; each module prints a table and writes its JSON."""

"""What an engine is: formats, programs, plans, the file. Pure data, no execution."""

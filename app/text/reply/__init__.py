"""What a model says in one turn, taken apart: its reasoning, the text for the reader, its calls of tools."""

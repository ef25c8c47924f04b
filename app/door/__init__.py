"""Who may come in, how much each may take, and what nobody may see.

`gate.Door` looks at every request before anything else does: its id, the name it calls us by, the page it comes from,
its key, and what the key's owner has left.
"""

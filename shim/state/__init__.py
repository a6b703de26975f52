"""What outlives a call: journal, undo, paths, processes by pid, log and trace.

Enters: facts of what is acquired.
Leaves: files below /run/kata-shim, and the means to undo what they record.
May import: none of its siblings.
"""

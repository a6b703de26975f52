"""OCI hooks on the host.

Enters: the `hooks` of a spec, and the state that they are told.
Leaves: processes that ran, in the namespaces that their stage asks for; those still owed are in the journal.
May import: spec, state.
"""

"""Modules that run in the guest only, below the agent: how it is started and what it is spared."""

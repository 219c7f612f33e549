"""Closed-loop load of agents: `kvarn bench agents`."""

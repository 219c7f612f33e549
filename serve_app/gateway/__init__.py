"""The gateway process: dispatching, queueing, and connections to engine replicas."""

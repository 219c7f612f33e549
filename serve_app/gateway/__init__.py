"""What runs in a gateway replica: dispatching, queueing, and connections to engine replicas."""

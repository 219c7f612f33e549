"""Discrete-event simulation of a fleet: the code of `serve_app.routing` against modelled engines."""

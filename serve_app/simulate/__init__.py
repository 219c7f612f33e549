"""A discrete-event simulation of a fleet: the routing code of `serve_app.routing` against modelled engines."""

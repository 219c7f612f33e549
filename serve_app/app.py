"""The application `serve run cluster/app.yaml` starts.

Serve turns the YAML's `args` into the builder's annotated class, which it cannot see if annotations are strings: so
this module has no `from __future__ import annotations`.
"""

from ray import serve

from serve_app.config import AppConfig
from serve_app.engine import engine_deployment
from serve_app.gateway import membership
from serve_app.gateway.gateway_deployment import Gateway


def build(args: AppConfig) -> serve.Application:
    """Engines and, bound to them, the gateways.

    Args:
        args: the settings; Serve makes them from the `args` of the YAML and refuses unknown keys.
    """
    config = args.gateway
    engines = engine_deployment.deployment(
        args.model, args.engine, args.observability, membership.ROUTER_CLASS
    )
    return serve.deployment(
        Gateway,
        name="Gateway",
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": 0},  # CPUs are counted for engines, which are bound to theirs
        graceful_shutdown_timeout_s=config.drain_grace_s + 10,
    ).bind(args.model, args.model_name, config, args.observability, args.engine.autoscaling, engines)

"""Builder of the application that `serve run cluster/app.yaml` starts.

Serve converts the YAML's `args` to the builder's annotated class, which it cannot resolve from string
annotations; therefore this module has no `from __future__ import annotations`.
"""

from ray import serve

from serve_app.config import AppConfig
from serve_app.engine import engine_deployment
from serve_app.gateway import membership
from serve_app.gateway.gateway_deployment import Gateway


def build(args: AppConfig) -> serve.Application:
    """Return the gateways, bound to the engines of both kinds.

    Args:
        args: settings, which Serve parses from `args` in the YAML; unknown keys are errors.
    """
    config = args.gateway
    engines = engine_deployment.deployment(
        args.model, args.engine, args.observability, membership.ROUTER_CLASS, config.reasoning_parser
    )
    prefills = None
    if args.disaggregation is not None:
        prefills = engine_deployment.deployment(
            args.model,
            args.engine,
            args.observability,
            membership.ROUTER_CLASS,
            config.reasoning_parser,
            args.disaggregation.prefill_replicas,
        )
    return serve.deployment(
        Gateway,
        name="Gateway",
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": 0},  # only engines reserve CPUs, which they are bound to
        graceful_shutdown_timeout_s=config.drain_grace_s + 10,
    ).bind(
        args.model,
        args.model_name,
        config,
        args.observability,
        args.engine.autoscaling,
        engines,
        adapters=tuple(args.engine.lora),
        disaggregation=args.disaggregation,
        prefills=prefills,
    )

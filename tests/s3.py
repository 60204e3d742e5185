"""A real S3 server on loopback, started and stopped by the tests themselves."""

from nec_ray.evaluate.bench_server import KEY, SECRET, Server, free_ports

__all__ = ["KEY", "SECRET", "Server", "free_ports"]

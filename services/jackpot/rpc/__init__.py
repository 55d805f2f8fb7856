"""gRPC between services: servers, channels, TLS, probes, and messages."""

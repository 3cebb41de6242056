"""Observability: Prometheus metrics, OpenTelemetry spans, and the log."""

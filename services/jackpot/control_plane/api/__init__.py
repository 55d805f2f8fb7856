"""The REST API of the control plane, on FastAPI: handlers translate requests and decide nothing."""

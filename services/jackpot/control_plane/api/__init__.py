"""The REST API of the control plane, on FastAPI: handlers translate; what happens is decided elsewhere."""

"""The engine on vLLM, and our code inside its worker processes."""

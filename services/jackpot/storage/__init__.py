"""What outlives a process: weight versions, objects, manifests, durable files."""

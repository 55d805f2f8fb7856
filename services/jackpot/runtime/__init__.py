"""What every process needs: the bus, the codec, gRPC, the weight store, metrics, logs."""

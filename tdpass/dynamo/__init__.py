"""`torch.compile(model, backend="tdpass")`: the backend, and the graphs that Dynamo records."""

"""A server that speaks OpenAI's protocol: `edge-demo serve`."""

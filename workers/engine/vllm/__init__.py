"""vLLM behind the Engine protocol. Imported only where it is chosen; nothing else imports vllm."""

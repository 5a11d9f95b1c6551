"""Any method as a LoRA, and LoRAs of one shape."""

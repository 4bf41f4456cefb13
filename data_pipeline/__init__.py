"""Images and prompts -> DALI -> latents and embeddings -> MDS shards -> a resumable stream."""

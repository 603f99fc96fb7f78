"""Hidden states on disk: what the target said about each sample, kept so that training needs no target.

    STORE/
      manifest.json               what the states depend on (target, template, taps, dtype ...), counts, checksums
      plan.jsonl                  which sample goes into which shard, written before the first shard
      shard-00000.safetensors     records end to end with offsets and a checksum per record, vocabulary counts
      sealed/shard-00000.json     size and checksum of a finished shard; a shard without it is made again
      target_head.safetensors     embedding, head and what the target does to its logits

A shard's content follows from the data and the settings alone, never from who wrote it or when: any number of writers,
stopped at any moment and started again, leave the same bytes.
"""

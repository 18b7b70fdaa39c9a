//! An example of every message, for the page. The test reads each by the types and writes it again.

/// What a client says, by type.
pub(super) const CLIENT: &str = r#"
{"id": 1, "type": "hello", "versions": [1], "label": "worker 3", "software": "my client 0.1", "keep_alive_ms": 30000}
{"id": 2, "type": "ping"}
{"id": 0, "type": "pong"}
{"id": 3, "type": "list", "query": "kind:lora base:sdxl size:<200MiB", "offset": 0, "limit": 50}
{"id": 4, "type": "show", "name": "sdxl-base"}
{"id": 5, "type": "plan", "names": ["sdxl-base", "ink-sketch"], "target": "vram:0", "dependencies": true, "split": false}
{"id": 6, "type": "plan-mix", "sets": [{"names": ["sdxl-base"], "target": "best", "dependencies": true, "split": false}, {"names": ["flux"], "target": "best", "dependencies": true, "split": false}], "gpus": [0, 1], "imagined": []}
{"id": 7, "type": "load", "names": ["sdxl-base/unet", "sdxl-base/vae"], "target": "ram", "dependencies": false, "priority": "interactive", "deadline_ms": 60000, "progress": true, "preemptible": false, "split": false, "keep_alive": "5m", "parts": true}
{"id": 8, "type": "cancel", "request": 7}
{"id": 9, "type": "release", "leases": [4, 5]}
{"id": 10, "type": "subscribe", "topics": ["catalogue", "pressure"]}
{"id": 11, "type": "unsubscribe", "topics": ["pressure"]}
{"id": 12, "type": "still-mapped", "memories": [{"component": "sdxl-base/unet", "content": "blake3:0b7a", "tier": "ram", "bytes": 5135149760}]}
{"id": 13, "type": "unmapped", "mappings": [1]}
{"id": 14, "type": "status"}
{"id": 15, "type": "why", "name": "sdxl-base", "limit": 20}
{"id": 16, "type": "analyse"}
{"id": 17, "type": "scan"}
{"id": 18, "type": "drain"}
"#;

/// What a server says, by type. Documents are cut short to what shows their kind.
pub(super) const SERVER: &str = r#"
{"id": 1, "type": "welcome", "version": 1, "server": "hotset 0.1.0", "instance": "3c1f-18d0a2", "session": 12, "limits": {"request_bytes": 1048576, "reply_bytes": 67108864, "names": 256, "text_bytes": 4096, "requests": 64, "behind_bytes": 67108864, "quota_bytes": null}}
{"id": 7, "type": "error", "code": "busy", "message": "this connection has too many requests under way; 64 are allowed", "retry_after_ms": 100}
{"id": 0, "type": "ping"}
{"id": 2, "type": "pong"}
{"id": 3, "type": "models", "generation": 4, "total": 1, "models": [{"name": "loras/ink-sketch", "kind": "lora", "bytes": 142000000}]}
{"id": 4, "type": "model", "model": {"name": "sdxl-base", "resident": {"unet": ["ram"]}}}
{"id": 5, "type": "plan", "plan": {"tier": "vram:0", "fit": "now"}}
{"id": 6, "type": "mix", "mix": {"fits": true, "sets": []}}
{"id": 7, "type": "planned", "plan": {"tier": "ram", "fit": "now"}}
{"id": 7, "type": "progress", "stage": "loading", "done": 1073741824, "total": 5302517760, "elapsed_s": 0.31, "bytes_per_s": 3500000000.0, "eta_s": 1.2, "components": [{"component": "sdxl-base/unet", "phase": "loading", "shared": false, "done": 1073741824, "total": 5135149760}]}
{"id": 7, "type": "leased", "leases": [{"lease": 4, "component": "sdxl-base/unet", "content": "blake3:0b7a", "tier": "ram", "bytes": 5135000000, "memory": 1, "table": 1}], "memories": [{"memory": 1, "tier": "ram", "bytes": 5135149760, "offset": 0, "mapped": 0, "descriptor": true}], "tables": [{"table": 1, "tensors": "91 95 a6 77 65 69 67 68 74 a3 46 33 32 92 02 03 40 18"}], "descriptors": 1, "more": true}
{"id": 8, "type": "cancelled", "found": true}
{"id": 9, "type": "released", "leases": [4, 5]}
{"id": 10, "type": "subscribed", "topics": ["catalogue", "pressure"]}
{"id": 10, "type": "catalogue", "changes": [{"change": "added", "name": "loras/new"}], "missed": 0}
{"id": 10, "type": "decision", "decision": {"act": "evict", "tier": "ram"}, "sentence": "evicted flux/vae from ram", "missed": 0}
{"id": 10, "type": "granted", "at_s": 93.25, "session": 4, "components": [{"component": "flux/vae", "content": "blake3:04d1", "kind": "vae", "bytes": 167666902}], "missed": 0}
{"id": 10, "type": "pressure", "pressure": "high", "host": {"available": 900000000}}
{"id": 0, "type": "revoke", "leases": [4], "grace_ms": 10000, "reason": "session 9 waits for 2.00 GiB more of vram:0"}
{"id": 12, "type": "counted", "mappings": [1], "bytes": 5135149760, "over_budget": 0}
{"id": 12, "type": "adopted", "mapping": 1, "component": "sdxl-base/unet", "resident": true}
{"id": 14, "type": "status", "status": {"health": {"state": "green"}}}
{"id": 15, "type": "decisions", "decisions": [{"act": "admit", "tier": "ram"}], "sentences": ["admitted 2 component(s)"]}
{"id": 16, "type": "usage", "usage": {"hit_share": 0.93}}
{"id": 17, "type": "scanned", "summary": {"models": 120, "files": 340, "took_s": 0.2}}
{"id": 18, "type": "draining"}
{"id": 0, "type": "goodbye", "code": "draining", "message": "the server ends"}
"#;

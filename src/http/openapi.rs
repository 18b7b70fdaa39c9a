//! `/openapi.json`: what there is, for tools that make clients.

use serde_json::{Value, json};

/// The document.
pub(super) fn document() -> Value {
    let name = json!([{
        "name": "name", "in": "path", "required": true, "schema": { "type": "string" },
        "description": "A model's name in the catalogue; slashes in it are part of the path",
    }]);
    let empty = json!({ "200": { "description": "Done" }, "default": { "$ref": "#/components/responses/Error" } });
    let answer = |description: &str, schema: Value| {
        json!({
            "200": { "description": description, "content": { "application/json": { "schema": schema } } },
            "default": { "$ref": "#/components/responses/Error" },
        })
    };
    let text = |description: &str, kind: &str| json!({ "200": { "description": description, "content": { kind: { "schema": { "type": "string" } } } } });
    let parameters = json!({
        "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Act" } } },
    });
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "hotset",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The model repository extension of the KServe protocol over the models that hotset keeps resident",
        },
        "security": [{}, { "token": [] }],
        "paths": {
            "/v2": { "get": { "summary": "Name, version and extensions of the server", "responses": answer("The server", json!({ "$ref": "#/components/schemas/Server" })) } },
            "/v2/health/live": { "get": { "summary": "Whether the server runs", "responses": empty } },
            "/v2/health/ready": { "get": { "summary": "Whether the load path works", "responses": empty } },
            "/v2/models/{name}": { "get": { "summary": "One model", "parameters": name, "responses": answer("The model", json!({ "$ref": "#/components/schemas/Model" })) } },
            "/v2/models/{name}/ready": { "get": { "summary": "Whether a model is loaded", "parameters": name, "responses": empty } },
            "/v2/repository/index": { "post": {
                "summary": "The catalogue, or of it what is loaded",
                "requestBody": { "content": { "application/json": { "schema": { "type": "object", "properties": { "ready": { "type": "boolean" } } } } } },
                "responses": answer("The models", json!({ "type": "array", "items": { "$ref": "#/components/schemas/Row" } })),
            } },
            "/v2/repository/models/{name}/load": { "post": { "summary": "Load a model and hold it", "parameters": name, "requestBody": parameters, "responses": empty } },
            "/v2/repository/models/{name}/unload": { "post": { "summary": "Let a model go", "parameters": name, "responses": empty } },
            "/healthz": { "get": { "summary": "Whether the load path works, with what does not", "responses": answer("It works", json!({ "type": "object" })) } },
            "/metrics": { "get": { "summary": "Metrics for Prometheus", "responses": text("Metrics", "application/openmetrics-text") } },
            "/events": { "get": { "summary": "Catalogue changes, decisions and memory pressure as they happen", "responses": text("Events", "text/event-stream") } },
        },
        "components": {
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
            "responses": { "Error": {
                "description": "Why not",
                "content": { "application/json": { "schema": { "type": "object", "required": ["error"], "properties": { "error": { "type": "string" }, "code": { "type": "string" } } } } },
            } },
            "schemas": {
                "Server": { "type": "object", "properties": { "name": { "type": "string" }, "version": { "type": "string" }, "extensions": { "type": "array", "items": { "type": "string" } } } },
                "Model": { "type": "object", "properties": { "name": { "type": "string" }, "versions": { "type": "array", "items": { "type": "string" } }, "platform": { "type": "string" } } },
                "Row": { "type": "object", "properties": { "name": { "type": "string" }, "version": { "type": "string" }, "state": { "enum": ["READY", "UNAVAILABLE"] }, "reason": { "type": "string" } } },
                "Act": { "type": "object", "properties": { "parameters": { "type": "object", "properties": { "target": { "type": "string", "description": "best, ram, vram or vram:N" } } } } },
            },
        },
    })
}

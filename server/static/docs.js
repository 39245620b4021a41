// Swagger UI on this server's own OpenAPI document.

globalThis.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  // Or the document's address would be sent to a public validator.
  validatorUrl: null,
});

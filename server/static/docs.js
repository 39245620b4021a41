// Swagger UI for this server's OpenAPI document.

globalThis.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  // By default Swagger UI sends the document's URL to a public validator.
  validatorUrl: null,
});

// Asks for an API key until one works or the user cancels. The key is stored until the tab is closed.

import * as api from "./api.js";

const dialog = document.getElementById("ask");

// Show the dialog. Return whether the user entered a key.
export async function askForKey(problem = "") {
  document.getElementById("ask-problem").textContent = problem;
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "use") return false;
  api.setKey(document.getElementById("ask-key").value.trim());
  return true;
}

export async function withKey(action) {
  for (;;) {
    try {
      return await action();
    } catch (error) {
      if (!(error instanceof api.ApiError) || ![401, 403].includes(error.status)) throw error;
      const problem = error.status === 403 ? error.message : "The server rejected this key.";
      if (!(await askForKey(sessionStorage.getItem("key") ? problem : ""))) throw error;
    }
  }
}

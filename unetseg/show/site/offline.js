// Keeps the page's files for use without a network, and serves them so that the browser allows several threads.
const CACHE = "VERSION", FILES = [];
self.addEventListener("install", (event) => event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES)).then(() => self.skipWaiting())));
self.addEventListener("activate", (event) => event.waitUntil(caches.keys().then((names) =>
  Promise.all(names.filter((name) => name !== CACHE && name.startsWith("unetseg")).map((name) => caches.delete(name)))).then(() => self.clients.claim())));
self.addEventListener("fetch", (event) => event.respondWith(caches.match(event.request, { ignoreSearch: true }).then(async (kept) => {
  const answer = kept ?? await fetch(event.request), headers = new Headers(answer.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return answer.type === "opaque" ? answer : new Response(answer.body, { status: answer.status, headers });
})));

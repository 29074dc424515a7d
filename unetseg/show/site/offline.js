// Keeps the page's files for use without a network, and serves them so that the browser allows several threads.
const FILES = [], PAGE = `unetseg ${self.registration.scope} `, CACHE = `${PAGE}VERSION`;
self.addEventListener("install", (event) => event.waitUntil(caches.open(CACHE) // past the HTTP cache, which may be older
  .then((cache) => cache.addAll(FILES.map((file) => new Request(file, { cache: "reload" })))).then(() => self.skipWaiting())));
self.addEventListener("activate", (event) => event.waitUntil(caches.keys().then((names) => Promise.all(names
  .filter((name) => name.startsWith(PAGE) && name !== CACHE).map((name) => caches.delete(name)))).then(() => self.clients.claim())));
self.addEventListener("fetch", (event) => event.respondWith(caches.match(event.request, { ignoreSearch: true }).then(async (kept) => {
  const answer = kept ?? await fetch(event.request), headers = new Headers(answer.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return answer.status ? new Response(answer.body, { status: answer.status, headers }) : answer; // 0: a redirection
})));

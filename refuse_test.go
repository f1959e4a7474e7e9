package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A browser that is told to come back is held for a second, as some clients reconnect at once. It does not count as a
// connection.
func TestRefusedBrowserIsHeld(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "MAX_CONNECTIONS=1", nil)
	first := g.open("/x")
	began := time.Now()
	const browser = "Accept: text/event-stream"
	held, old, left := g.get("/x", browser), g.dial("GET /x HTTP/1.0\r\n"+browser+"\r\n\r\n"), g.get("/x", browser)
	for _, c := range []*streamClient{held, old, left} {
		c.wantTransient("no capacity")
	}
	left.reset()
	first.Close()
	g.waitMetric("gateway_streams", 0)
	g.open("/x")
	held.wantEnd()
	old.wantEnd()
	if took := time.Since(began); took < time.Second {
		t.Errorf("the refusals ended after %v, want a second", took)
	}
	g.wantMetric(`gateway_streams_closed_total{reason="server_closed"}`, 0)
}

// Only a client that takes event streams is told by one.
func TestAcceptsEventStream(t *testing.T) {
	t.Parallel()
	for accept, want := range map[string]bool{
		"": false, "*/*": false, "text/*": false, "text/html": false, "text/event-streams": false, "x-text/event-stream": false,
		"text/event-stream;q=0": false, "text/event-stream; q=0.000, */*": false, "text/html;a=text/event-stream": false,
		"text/event-stream": true, "TEXT/Event-Stream ; charset=utf-8": true, "text/event-stream;q=0.5": true,
		"application/json,text/event-stream": true, "text/html;q=0, text/event-stream, */*;q=0": true,
		"text/event-stream;q=x": true, "text/event-stream;": true, "text/event-stream;;": true, "text/html\ntext/event-stream": true,
	} {
		r := httptest.NewRequest("GET", "/x", nil)
		r.Header["Accept"] = strings.Split(accept, "\n")
		if got := acceptsEventStream(r); got != want {
			t.Errorf("%q: got %v, want %v", accept, got, want)
		}
	}
}

// Held refusals are bounded, and a shutdown does not wait for them.
func TestHeldRefusalsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(gatewayConfig{}, slog.New(slog.DiscardHandler), newRegistry("test"))
		refuse := func(n int) (streams []*stream) {
			for range n {
				s := &stream{cfg: &g.cfg}
				g.hold(s)
				streams = append(streams, s)
			}
			return streams
		}
		ended := func(streams []*stream) (n int) {
			synctest.Wait()
			for _, s := range streams {
				s.mu.Lock()
				if s.state >= streamEnding {
					n++
				}
				s.mu.Unlock()
			}
			return n
		}
		streams := refuse(1003)
		if got := ended(streams); got != 3 {
			t.Errorf("got %d of 1003 ended at once, want 3", got)
		}
		time.Sleep(time.Second - time.Nanosecond)
		if got := ended(streams); got != 3 {
			t.Errorf("got %d ended within the second, want 3", got)
		}
		time.Sleep(time.Nanosecond)
		if got := ended(streams); got != 1003 {
			t.Errorf("got %d ended after a second, want all", got)
		}
		streams = refuse(10)
		began := time.Now()
		g.shutdown(t.Context())
		if got, took := ended(append(streams, refuse(1)...)), time.Since(began); got != 11 || took > 100*time.Millisecond {
			t.Errorf("in a shutdown: got %d of 11 ended after %v, want all at once", got, took)
		}
	})
}

func TestRefusalTellsTheReason(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("é", 128)
	answers := []struct{ body, want string }{
		{`{"error":"this stream is finished","code":"stream_finished"}`, "this stream is finished"},
		{`{"error":"` + long + `"}`, long},
		{`{"error":"a\r\n\nid: 7\r: b"}`, "a\r\n\nid: 7\r: b"},
		{`{"error":"` + long + `x"}`, "connection rejected"},
		{`{"error":""}`, "connection rejected"}, {`{"error":1}`, "connection rejected"}, {`{"error":null}`, "connection rejected"},
		{`{"message":"no"}`, "connection rejected"}, {`["error"]`, "connection rejected"}, {``, "connection rejected"},
		{`<p>no</p>`, "connection rejected"}, {`{"error":"a"} x`, "connection rejected"},
	}
	g := newGatewayFixture(t, "", func(w http.ResponseWriter, c callbackCall) {
		answering(c.number()/100, answers[c.number()%100].body)(w, c)
	})
	for i, tt := range answers {
		if got, want := g.get(fmt.Sprint("/", 41000+i)).reply(), "410 "+string(marshal(map[string]string{"error": tt.want})); got != want {
			t.Errorf("%.60s: got %s, want %s", tt.body, got, want)
		}
		oneLine := strings.NewReplacer("\r", " ", "\n", " ").Replace(tt.want)
		g.get(fmt.Sprint("/", 50300+i), "Accept: text/event-stream").wantTransient(oneLine)
	}
}

// A stream replaces another, so a page of another site must not open one, not even with an <img>.
func TestOtherSites(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		allowed string
		headers string // "; " between them
		want    bool
	}{
		{"", "", true}, // not a browser
		{"", "Sec-Fetch-Site: none", true},
		{"", "Sec-Fetch-Site: same-origin", true},
		{"", "Sec-Fetch-Site: same-site", false},
		{"", "Sec-Fetch-Site: cross-site", false},
		{"", "Origin: http://gateway.test", true}, // the fixture's Host
		{"", "Origin: https://Gateway.test", true},
		{"", "Origin: https://gateway.test; Sec-Fetch-Site: cross-site", false},
		{"", "Origin: http://gateway.test:8080", false},
		{"", "Origin: https://app.test", false},
		{"", "Origin: https://app.test; Sec-Fetch-Site: same-origin", false},
		{"", "Origin: null", false},
		{"", "Origin: http://%zz", false},
		{"https://app.test", "Origin: https://app.test", true},
		{"https://app.test", "Origin: https://app.test; Sec-Fetch-Site: cross-site", true},
		{"https://app.test", "Origin: http://app.test; Sec-Fetch-Site: cross-site", false},
		{"https://app.test", "Sec-Fetch-Site: cross-site", false},
		{"https://app.test", "Origin: null", false},
		{"https://app.test", "Origin: http://gateway.test; Sec-Fetch-Site: same-origin", true},
		{"*", "Origin: https://any.test; Sec-Fetch-Site: cross-site", true},
		{"*", "Origin: null", true},
		{"*", "Sec-Fetch-Site: same-site", false},
		{"*", "Sec-Fetch-Site: cross-site", false}, // an <img> sends no Origin
	} {
		g := newGatewayFixture(t, "CORS_ALLOW_ORIGIN="+tt.allowed, nil)
		headers := []string{"Accept: text/event-stream"}
		if tt.headers != "" {
			headers = append(headers, strings.Split(tt.headers, "; ")...)
		}
		if tt.want {
			g.open("/x", headers...)
			continue
		}
		const refused = `403 {"error":"request from another site"}`
		if got := g.get("/x", headers...).reply(); got != refused || len(g.connects) > 0 {
			t.Errorf("%+v: got %s, the backend was asked %d times; want %s, never", tt, got, len(g.connects), refused)
		}
	}
}

// A browser sends a preflight for what an EventSource cannot do, such as a fetch that resumes by itself.
func TestPreflight(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ allowed, credentials, vary string }{{"https://app.test", "true", "Origin"}, {"*", "", ""}} {
		g := newGatewayFixture(t, "CORS_ALLOW_ORIGIN="+tt.allowed, nil)
		resp := g.request("OPTIONS", "/x", "Origin: https://app.test", "Sec-Fetch-Site: cross-site",
			"Access-Control-Request-Method: GET", "Access-Control-Request-Headers: authorization,last-event-id").answer()
		for name, want := range map[string]string{
			"Access-Control-Allow-Origin":      tt.allowed,
			"Access-Control-Allow-Methods":     "GET",
			"Access-Control-Allow-Headers":     "Last-Event-ID, Cache-Control, Authorization",
			"Access-Control-Allow-Credentials": tt.credentials,
			"Access-Control-Max-Age":           "7200",
			"Vary":                             tt.vary,
			"Cache-Control":                    "no-store",
		} {
			if got := resp.Header.Get(name); got != want || resp.StatusCode != 204 {
				t.Errorf("CORS_ALLOW_ORIGIN=%s: got %s, %s: %q; want 204, %q", tt.allowed, resp.Status, name, got, want)
			}
		}
		if got := g.request("OPTIONS", "/x").answer().StatusCode; got != 405 {
			t.Errorf("OPTIONS that is not a preflight: got %d, want 405", got)
		}
	}
	g := newGatewayFixture(t, "", nil)
	if got := g.request("OPTIONS", "/x", "Access-Control-Request-Method: GET").answer().StatusCode; got != 405 {
		t.Errorf("without CORS_ALLOW_ORIGIN: got %d, want 405", got)
	}
}

// A stream keeps its request in JSON for the disconnect callback, so it must not grow there without limit.
func TestLargeRequests(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	const refused = `431 {"error":"request header too large"}`
	for _, tt := range []struct {
		name, value string
		want        bool
	}{
		{"15 KiB", strings.Repeat("x", 15<<10), true},
		{"7 KiB of quotes", strings.Repeat(`"`, 7<<10), true},
		{"8 KiB of quotes", strings.Repeat(`"`, 8<<10), false},
		{"bytes that are not UTF-8", strings.Repeat("\xff", 15<<10), true},
		{"bytes that are not UTF-8, with others between", strings.Repeat("\xffx", 3<<10), true},
		{"more of them", strings.Repeat("\xffx", 5<<10), false},
	} {
		c := g.get("/x", "X: "+tt.value)
		if !tt.want {
			c.wantReply(refused)
			continue
		}
		g.asked(c).begin()
		if got, want := c.callback.Request.Headers["x"], strings.ToValidUTF8(tt.value, "\ufffd"); got != want {
			t.Errorf("%s: the backend got %.20q, want %.20q", tt.name, got, want)
		}
		if got := len(c.callback.body); got > 16<<10+200 {
			t.Errorf("%s: the callback has %d bytes", tt.name, got)
		}
	}
	// net/http itself refuses a larger head.
	for size, want := range map[int]int{16 << 10: 200, 16<<10 + 1: 431} {
		head := "GET /healthz HTTP/1.1\r\nHost: h\r\nX: "
		if got := g.dial(head + strings.Repeat("x", size-len(head)-len("\r\n\r\n")) + "\r\n\r\n").answer().StatusCode; got != want {
			t.Errorf("a head of %d bytes: got %d, want %d", size, got, want)
		}
	}
}

// Some proxies send every request with a chunked body, even if it is empty.
func TestEmptyChunkedBody(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	const head = "GET /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
	for _, tt := range []struct{ name, first, then string }{
		{"whole", head + "0\r\n\r\n", ""},
		{"with a trailer", head + "0\r\nX: y\r\n\r\n", ""},
		{"in two pieces", head, "0\r\n\r\n"},
		{"in three", head + "0\r\n", "\r\n"},
	} {
		c := g.dial(tt.first)
		if tt.then != "" {
			time.Sleep(20 * time.Millisecond) // for the first to arrive on its own; either way it must work
			c.write(tt.then)
		}
		g.asked(c).begin()
		g.wantLive(c)
	}
}

// The log says what is wrong and where to look, at most once a minute.
func TestLogOfRefusals(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		settings string
		answer   backendAnswer
		want     string
	}{
		{"", answering(404, ""), `msg="the backend takes no callbacks there: is the path of CALLBACK_URL right?" status=404 count=1`},
		{"", answering(405, ""), `msg="the backend takes no callbacks there: is the path of CALLBACK_URL right?" status=405 count=1`},
		{"", answering(308, ""), `msg="the backend takes no callbacks there: is the path of CALLBACK_URL right?" status=308 count=1`},
		{"", answering(401, ""), `msg="the backend refuses callbacks: is the secret in CALLBACK_URL right?" status=401 count=1`},
		{"CALLBACK_URL=http://127.0.0.1:1" + callbackTarget, nil, `msg="callback failed" action=connect err="dial tcp 127.0.0.1:1: connect: connection refused" count=1`},
		{"MAX_CONNECTIONS=1", nil, `msg="streams are turned away: MAX_CONNECTIONS is reached" limit=1 count=1`},
		{"", answering(410, ""), ""},
	} {
		g := newGatewayFixture(t, tt.settings, tt.answer)
		if strings.HasPrefix(tt.settings, "MAX") {
			g.open("/x")
		}
		for range 60 {
			g.get("/x").reply()
		}
		var got []string
		for line := range strings.Lines(g.logged.String()) {
			if _, text, ok := strings.Cut(line, "level=WARN "); ok {
				got = append(got, strings.TrimSpace(text))
			}
		}
		if strings.Join(got, "\n") != tt.want {
			t.Errorf("got warnings %q, want %q", got, tt.want)
		}
	}
}

func TestRefusalMetrics(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "MAX_CONNECTIONS=1", func(w http.ResponseWriter, c callbackCall) {
		w.WriteHeader(max(c.number(), 200))
	})
	for _, status := range []string{"410", "403", "302", "500", "429"} {
		g.get("/" + status).reply()
	}
	g.get("/503", "Accept: text/event-stream").wantTransient("connection rejected")
	g.request("PUT", "/x").reply()
	g.get("/x", "Sec-Fetch-Site: cross-site").reply()
	c := g.open("/x")
	g.get("/x").reply()
	g.get("/x", "Accept: text/event-stream").wantTransient("no capacity")
	g.send(c.callback.Token, "1")
	g.post("text/plain", "")
	g.get("/healthz").reply()
	g.get("/readyz").reply()
	g.request("POST", "/readyz").reply()
	g.request("POST", "/internal/reset", "Content-Type: application/json", "Content-Length: 0").reply()
	wantSeries(t, scrapeURL(g.client, g.internal), map[string]float64{
		`gateway_refused_total{reason="rejected"}`: 3,
		`gateway_refused_total{reason="backend"}`:  3,
		`gateway_refused_total{reason="request"}`:  2,
		`gateway_refused_total{reason="capacity"}`: 2,
		`http_requests_total{code="4xx"}`:          1,
		`http_requests_total{code="401"}`:          1,
		`http_requests_total{code="5xx"}`:          0,
	})
	before := g.metric(`http_requests_total{code="2xx"}`)
	if after := g.metric(`http_requests_total{code="2xx"}`); before < 2 || after != before+1 {
		t.Errorf("requests answered 2xx: got %v and, after a scrape, %v", before, after)
	}
	silent := newGatewayFixture(t, "CALLBACK_URL=http://127.0.0.1:1"+callbackTarget, nil)
	silent.get("/x").reply()
	silent.wantMetric(`gateway_refused_total{reason="backend"}`, 1)
}

// Browsers and caches keep an answer that does not forbid it, and would serve a 410 to the next request.
func TestAnswersAreNotCached(t *testing.T) {
	t.Parallel()
	backendInternal, gatewayInternal := fmt.Sprint("127.0.0.1:", freePort(t)), fmt.Sprint("127.0.0.1:", freePort(t))
	b, stub := startBackend(t, "INTERNAL_ADDR="+backendInternal), newStubBackend(t, answering(410, ""))
	g := startOwnGateway(t, "INTERNAL_ADDR="+gatewayInternal, "CALLBACK_URL="+stub.server.URL+callbackTarget)
	own := startOwnGateway(t)
	for base, requests := range map[string][]string{
		b.URL: {"200 GET /", "200 GET /healthz", "200 GET /readyz", "200 GET /metrics", "404 GET /nothing", "405 PUT /api/tasks",
			"200 GET /api/tasks", "404 GET /api/tasks/x/status", "400 POST /api/tasks", "405 POST /api/sse/tasks", "401 POST /api/sse/callback",
			"400 GET /api/sse/tasks", "404 GET /internal/send", "400 GET /api/sse//tasks", "400 GET /api/sse/x", "404 GET /debug/pprof/goroutine"},
		g.URL: {"200 GET /healthz", "200 GET /readyz", "404 GET /metrics", "410 GET /x", "405 PUT /x", "405 POST /healthz", "404 POST /internal/send",
			"410 GET /debug/pprof/goroutine"},
		own.URL: {"503 GET /x", "503 GET /readyz", "200 GET /metrics", "405 GET /internal/send", "415 POST /internal/send",
			"415 POST /internal/reset"},
		// Profiles are here alone: they reveal too much for a public address, and can keep a core busy.
		"http://" + backendInternal: {"200 GET /metrics", "200 GET /debug/pprof/", "404 GET /x", "404 GET /healthz"},
		"http://" + gatewayInternal: {"200 GET /metrics", "200 GET /debug/pprof/heap?debug=1",
			"404 GET /debug/pprof/x", "404 GET /x", "404 GET /healthz", "405 PUT /metrics", "30 GET /debug//pprof/"},
	} {
		for _, request := range requests {
			status, rest, _ := strings.Cut(request, " ")
			method, target, _ := strings.Cut(rest, " ")
			req, err := http.NewRequest(method, base+target, nil)
			must(t, err)
			resp, err := new(http.Transport).RoundTrip(req)
			must(t, err)
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if got := resp.Header.Get("Cache-Control"); got != "no-store" || !strings.HasPrefix(resp.Status, status) {
				t.Errorf("%s: got %s with Cache-Control %q, want no-store", request, resp.Status, got)
			}
		}
	}
}

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	goparser "go/parser"
	"go/token"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// apiFixture is a backend, put together and routed as in main, with a gateway in memory. The epoch of events is "e".
type apiFixture struct {
	*backend
	t       testing.TB
	handler http.Handler
	gateway *apiGateway
	logged  *testOutput
	settle  func() // waits until nothing is under way, if that can be known
}

// newAPI returns a fixture with settings like "API_TOKEN=x TASK_MAX_WORKERS=1".
func newAPI(t testing.TB, settings string) *apiFixture {
	t.Helper()
	env := settingsEnv("LOG_LEVEL=debug " + settings)
	cfg, err := loadBackendConfig(getenvFrom(env))
	must(t, err)
	api := &apiFixture{t: t, gateway: &apiGateway{streams: map[string]*apiStream{}}, logged: &testOutput{}, settle: func() {}}
	log, err := newLogger(getenvFrom(env), api.logged)
	must(t, err)
	api.backend = newBackend(cfg, "http://gateway.invalid", newRegistry("test"), log)
	api.conns.gateway = api.gateway
	epoch := func() string { return "e" }
	api.tasks.policy.epoch, api.version.policy.epoch = epoch, epoch
	api.handler = newServer(log, api.reg, api.routes(nil)).Handler
	t.Cleanup(func() { api.stop(context.Background()) })
	return api
}

// settingsEnv returns the environment for settings like "API_TOKEN=x TASK_MAX_WORKERS=1". Later settings win.
func settingsEnv(settings string) map[string]string {
	env := map[string]string{}
	for setting := range strings.FieldsSeq(settings) {
		name, value, _ := strings.Cut(setting, "=")
		env[name] = value
	}
	return env
}

// apiTest runs a story in a bubble of its own, where time begins at 2000-01-01T00:00:00Z and passes only while
// everybody waits for it.
func apiTest(t *testing.T, settings string, story func(t *testing.T, api *apiFixture)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		api := newAPI(t, settings)
		api.settle = synctest.Wait
		story(t, api)
	})
}

// apiStory is apiTest as a subtest.
func apiStory(t *testing.T, name, settings string, story func(t *testing.T, api *apiFixture)) {
	t.Helper()
	t.Run(name, func(t *testing.T) { apiTest(t, settings, story) })
}

// request sends a request with headers like "Accept: text/html".
func (api *apiFixture) request(method, target, body string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	r.Host = "localhost"
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		if name == "Host" {
			r.Host = value
		}
		r.Header.Set(name, value)
	}
	w := httptest.NewRecorder()
	api.handler.ServeHTTP(w, r)
	return w
}

// do sends a request and returns the answer in one line: `404 {"error":"…"}`.
func (api *apiFixture) do(method, target, body string, headers ...string) string {
	w := api.request(method, target, body, headers...)
	return strconv.Itoa(w.Code) + " " + strings.TrimSpace(w.Body.String())
}

// check sends a request and checks the answer, in the form of do.
func (api *apiFixture) check(method, target, body, want string, headers ...string) {
	api.t.Helper()
	if got := api.do(method, target, body, headers...); got != want {
		api.t.Errorf("%s %s %.80s %q: got %.300s, want %.300s", method, target, body, headers, got, want)
	}
}

// metric returns the value of one series of /metrics.
func (api *apiFixture) metric(series string) float64 { return scrapeValue(scrapeAll(api.reg), series) }

// wantMetric checks the value of one series.
func (api *apiFixture) wantMetric(series string, want float64) {
	api.t.Helper()
	if got := api.metric(series); got != want {
		api.t.Errorf("%s: got %v, want %v", series, got, want)
	}
}

// apiGateway is a gateway in memory. It tells nobody when a stream ends.
type apiGateway struct {
	mu      sync.Mutex
	streams map[string]*apiStream // open ones by token
	err     error                 // the error of every send; nil if sends work
}

// apiStream is a stream that the backend has accepted.
type apiStream struct {
	api   *apiFixture
	token string
	got   []event // guarded by the gateway's mu
}

func (g *apiGateway) send(token string, events []event, end bool) sendResult {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.streams[token]
	switch {
	case g.err != nil:
		return sendResult{err: g.err}
	case s == nil:
		return sendResult{err: errUnknownToken}
	}
	s.got = append(s.got, onTheWire(events)...)
	if end {
		delete(g.streams, token)
	}
	return sendResult{taken: len(events)}
}

// fail makes every send fail with err from now on; nil makes them work again.
func (g *apiGateway) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.err = err
}

// connect opens a stream as a gateway does, perhaps after a last event ID.
func (api *apiFixture) connect(target string, lastEventID ...string) *apiStream {
	api.t.Helper()
	s := &apiStream{api: api, token: newToken()}
	api.gateway.mu.Lock()
	api.gateway.streams[s.token] = s
	api.gateway.mu.Unlock()
	w := api.request("POST", "/api/sse/callback", apiConnect(s.token, target, lastEventID...))
	var answer struct{ Event event }
	if err := json.Unmarshal(w.Body.Bytes(), &answer); w.Code != http.StatusOK || err != nil {
		api.t.Fatalf("connecting to %s: got %d %s", target, w.Code, w.Body)
	}
	api.gateway.mu.Lock()
	defer api.gateway.mu.Unlock()
	s.got = append([]event{answer.Event}, s.got...) // the gateway holds back what came before
	return s
}

// apiConnect is the body of a connect callback.
func apiConnect(token, target string, lastEventID ...string) string {
	headers := map[string]string{"user-agent": "test"}
	if len(lastEventID) > 0 {
		headers["last-event-id"] = lastEventID[0]
	}
	request := map[string]any{"url": target, "headers": headers}
	return string(marshal(map[string]any{"action": "connect", "token": token, "request": request}))
}

// apiDisconnect is the body of a disconnect callback.
func apiDisconnect(token string) string {
	return fmt.Sprintf(`{"action":"disconnect","reason":"client_closed","token":%q,"request":{"url":"/","headers":{}}}`, token)
}

// lose makes the gateway forget the stream and tell nobody, as in a crash.
func (s *apiStream) lose() {
	s.api.gateway.mu.Lock()
	defer s.api.gateway.mu.Unlock()
	delete(s.api.gateway.streams, s.token)
}

// leave has the browser close the stream, and the gateway tell the backend.
func (s *apiStream) leave() {
	s.lose()
	s.api.do("POST", "/api/sse/callback", apiDisconnect(s.token))
}

// lastID returns the last event ID that the browser got.
func (s *apiStream) lastID() (id string) {
	for _, e := range s.events() {
		id = cmp.Or(e.ID, id)
	}
	return id
}

func (s *apiStream) events() []event {
	s.api.settle()
	s.api.gateway.mu.Lock()
	defer s.api.gateway.mu.Unlock()
	return append([]event(nil), s.got...)
}

// text returns all that the browser got, with a line "id name data" for each event.
func (s *apiStream) text() string {
	var lines strings.Builder
	for _, e := range s.events() {
		fmt.Fprintln(&lines, e.ID, e.Name, e.Data)
	}
	return lines.String()
}

// wantText checks all that the browser got.
func (s *apiStream) wantText(want string) {
	s.api.t.Helper()
	if got := s.text(); got != want {
		s.api.t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// story returns all that the browser got, in short: "connection_open task_started task_completed
// connection_close:task_completed", "connection_open version:1 version:2".
func (s *apiStream) story() string {
	var words []string
	for _, e := range s.events() {
		var data struct {
			EventType string `json:"event_type"`
			Version   string
			Reason    string
		}
		json.Unmarshal([]byte(e.Data), &data)
		word := cmp.Or(data.EventType, e.Name)
		if detail := data.Version + data.Reason; detail != "" {
			word += ":" + detail
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

// checkStory checks the story of a stream.
func (s *apiStream) checkStory(want string) {
	s.api.t.Helper()
	if got := s.story(); got != want {
		s.api.t.Errorf("got %s, want %s", got, want)
	}
}

// apiRoutes returns the backend's routes with certain methods, like "POST|DELETE". It reads them from main.go, so that
// a route added there is tested here.
func apiRoutes(t *testing.T, methods string) (routes [][2]string) {
	t.Helper()
	for _, m := range regexp.MustCompile(`"(`+methods+`) (/api/[^"]*)"`).FindAllStringSubmatch(edited(t, "main.go"), -1) {
		routes = append(routes, [2]string{m[1], m[2]})
	}
	if len(routes) == 0 {
		t.Fatalf("no route with %s in main.go", methods)
	}
	return routes
}

func TestRoutes(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	for _, tt := range []struct{ method, target, want, allow string }{
		{"GET", "/healthz", `200 {"status":"ok"}`, ""},
		{"GET", "/readyz", `200 {"status":"ready"}`, ""},
		{"GET", "/api/tasks", `200 {"tasks":[]}`, ""},
		{"GET", "/nothing", `404 {"error":"not found","code":"not_found"}`, ""},
		{"GET", "/api/tasks/", `404 {"error":"not found","code":"not_found"}`, ""},
		{"GET", "/api/tasks/x", `405 {"error":"method not allowed","code":"method_not_allowed"}`, "DELETE"},
		{"GET", "/api/sse/tasks", `404 {"error":"not found","code":"not_found"}`, ""}, // streams are the gateway's
		{"GET", "/api/sse/callback", `405 {"error":"method not allowed","code":"method_not_allowed"}`, "POST"},
		{"PUT", "/api/tasks", `405 {"error":"method not allowed","code":"method_not_allowed"}`, "GET, HEAD, POST"},
		{"DELETE", "/api/tasks/x/status", `405 {"error":"method not allowed","code":"method_not_allowed"}`, "GET, HEAD"},
		{"GET", "/api/deployments/version", `405 {"error":"method not allowed","code":"method_not_allowed"}`, "POST"},
		{"POST", "/healthz", `405 {"error":"method not allowed","code":"method_not_allowed"}`, "GET, HEAD"},
		{"POST", "/metrics", `405 {"error":"method not allowed","code":"method_not_allowed"}`, "GET, HEAD"},
		{"POST", "/", `405 {"error":"method not allowed","code":"method_not_allowed"}`, "GET, HEAD"},
	} {
		w := api.request(tt.method, tt.target, "")
		got := fmt.Sprint(w.Code, " ", strings.TrimSpace(w.Body.String()))
		allow, contentType := w.Header().Get("Allow"), w.Header().Get("Content-Type")
		if got != tt.want || allow != tt.allow || contentType != "application/json" {
			t.Errorf("%s %s: got %s, Allow %q, Content-Type %q; want %s, %q, JSON", tt.method, tt.target, got, allow, contentType, tt.want, tt.allow)
		}
	}
}

func TestPageIsForDevelopmentOnly(t *testing.T) {
	t.Parallel()
	w := newAPI(t, "").request("GET", "/", "")
	if w.Code != http.StatusOK || !bytes.Equal(w.Body.Bytes(), indexPage) || w.Header().Get("Content-Security-Policy") == "" {
		t.Errorf("in development: got %d and %d bytes, want 200, the page and a policy", w.Code, w.Body.Len())
	}
	production := newAPI(t, "APP_ENV=production API_TOKEN=a-long-enough-token")
	production.check("GET", "/", "", `404 {"error":"not found","code":"not_found"}`)
}

func TestMetricsRoute(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.start(`{"type":"external"}`)
		api.start(`{"type":"failing","params":{"delay":0}}`)
		api.subscribe("r")
		api.settle()
		wantSeries(t, api.request("GET", "/metrics", "").Body.String(), map[string]float64{
			`tasks{status="running"}`:                                   1,
			`tasks{status="failed"}`:                                    1,
			`tasks{status="completed"}`:                                 0,
			`task_executions_total{type="failing",status="failed"}`:     1,
			`task_executions_total{type="external",status="completed"}`: 0,
			`sse_outbox_events{service="task"}`:                         3,
			`sse_outbox_events{service="version"}`:                      0,
			`sse_gateway_active_connections{service="version"}`:         1,
		})
	})
}

func TestAPIToken(t *testing.T) {
	t.Parallel()
	const token = "a-long-enough-token"
	headers := map[string]bool{ // value, and whether it is accepted
		"":                      false,
		token:                   false,
		"Bearer":                false,
		"Bearer ":               false,
		"Bearer " + token[1:]:   false,
		"Bearer " + token + "x": false,
		"Basic " + token:        false,
		"Bearer " + token:       true,
		"bearer " + token:       true, // a scheme's case does not matter (RFC 9110 section 11.1)
	}
	for _, environment := range []string{"development", "production"} {
		api := newAPI(t, "APP_ENV="+environment+" API_TOKEN="+token)
		check := func(method, target string, protected bool) {
			t.Helper()
			for value, opens := range headers {
				w := api.request(method, target, "", "Authorization: "+value)
				got, want := w.Code == http.StatusUnauthorized, protected && !opens
				if got != want || want != (w.Header().Get("WWW-Authenticate") != "") {
					t.Errorf("%s: %s %s with %q: got %d and WWW-Authenticate %q, want 401: %v",
						environment, method, target, value, w.Code, w.Header().Get("WWW-Authenticate"), want)
				}
			}
		}
		for _, route := range apiRoutes(t, "POST|DELETE") {
			target := strings.Replace(route[1], "{task_id}", "x", 1)
			check(route[0], target, target != "/api/sse/callback") // the callback has a secret of its own
		}
		check("GET", "/api/tasks", environment == "production")
		check("GET", "/api/tasks/x/status", false)
		check("GET", "/api/tasks/x/events", false)
		if strings.Contains(api.logged.String(), token) {
			t.Errorf("%s: the token is in the log", environment)
		}
	}
	if got, want := newAPI(t, "").do("POST", "/api/tasks", `{"type":"external"}`), "202 "; !strings.HasPrefix(got, want) {
		t.Errorf("without a token configured: got %s, want %s", got, want)
	}
}

// A page of another site must not change anything here through the browser of somebody who can reach this server.
func TestCrossSitePostRefused(t *testing.T) {
	t.Parallel()
	const refused = `403 {"error":"request from another site","code":"cross_site"}`
	api := newAPI(t, "")
	for _, route := range apiRoutes(t, "POST|DELETE") {
		for header, want := range map[string]bool{
			"Sec-Fetch-Site: cross-site":   true,
			"Origin: https://evil.example": true,
			"Origin: null":                 true,
			"Sec-Fetch-Site: same-origin":  false,
			"Sec-Fetch-Site: none":         false,
			"Origin: http://localhost":     false, // the host of the request
			"X-None: of these":             false, // not from a browser
		} {
			if got := api.do(route[0], route[1], "", header); (got == refused) != want {
				t.Errorf("%s %s with %s: got %s, want refused: %v", route[0], route[1], header, got, want)
			}
		}
	}
	api.check("GET", "/api/tasks", "", `200 {"tasks":[]}`, "Sec-Fetch-Site: cross-site")
}

func TestStopping(t *testing.T) {
	apiStory(t, "embedded gateway", "", func(t *testing.T, api *apiFixture) {
		stream := api.follow(api.start(`{"type":"external","params":{"task_id":"a"}}`))
		api.stop(t.Context())
		api.check("GET", "/readyz", "", `503 {"status":"not_ready"}`)
		api.check("GET", "/healthz", "", `200 {"status":"ok"}`)
		api.check("POST", "/api/tasks", `{"type":"external"}`, `503 {"error":"shutting down","code":"shutting_down"}`)
		api.check("POST", "/api/tasks/a/complete", `{}`, `503 {"error":"shutting down","code":"shutting_down"}`)
		api.check("POST", "/api/deployments/version", `{"version":"1"}`, `503 {"error":"shutting down","code":"shutting_down"}`)
		stream.checkStory("connection_open task_started task_failed connection_close:task_failed")
	})

	// A gateway that stays would hold streams that nobody sends to any more. They end without connection_close, so that
	// the browsers come back to the next backend.
	apiStory(t, "separate gateway", "SSE_GATEWAY_URL=http://gateway.invalid", func(t *testing.T, api *apiFixture) {
		stream := api.subscribe("r")
		api.stop(t.Context())
		stream.checkStory("connection_open")
		if got := len(api.gateway.streams); got != 0 {
			t.Errorf("got %d open streams, want none", got)
		}
	})
}

func TestLoggedOnceASecond(t *testing.T) {
	// A server that is out of file descriptors logs errors without end.
	apiStory(t, "server errors", "", func(t *testing.T, api *apiFixture) {
		server := newServer(api.log, api.reg, api.handler)
		for range 1000 {
			server.ErrorLog.Print("no luck")
			time.Sleep(2 * time.Millisecond)
		}
		log := api.logged.String()
		if got := strings.Count(log, "level=WARN"); got > 3 || !regexp.MustCompile(`err="no luck" count=(499|500|501)\n`).MatchString(log) {
			t.Errorf("got %d lines, want at most 3, and the second with a count of about 500:\n%s", got, log)
		}
	})

	// Somebody who guesses tokens must neither fill the log nor go unnoticed.
	apiStory(t, "wrong tokens", "API_TOKEN=s3cret", func(t *testing.T, api *apiFixture) {
		for try := range 1000 {
			if try == 999 {
				time.Sleep(time.Second)
			}
			api.do("POST", "/api/tasks", `{"type":"demo"}`, "Authorization: Bearer wr0ng")
		}
		api.settle()
		log := api.logged.String()
		if n := strings.Count(log, "level=WARN"); n != 2 || !strings.Contains(log, "count=999") || strings.Contains(log, "wr0ng") {
			t.Errorf("got log %s\nwant two warnings, the second of 999", log)
		}
	})
}

// apiMalformed returns a body that is not JSON, made from a good one.
func apiMalformed(r *rand.Rand, good string) string {
	body := []byte(good)
	for json.Valid(body) && utf8.Valid(body) {
		switch at := r.IntN(len(body)); r.IntN(6) {
		case 0:
			body = body[:at]
		case 1:
			body[at] = byte(r.Uint32())
		case 2:
			body = slices.Delete(body, at, at+1)
		case 3: // punctuation, or a byte that is valid nowhere: a control character, or one that is not in UTF-8
			body = slices.Insert(body, at, "{}[]\",:\\\x00\x1f\xff"[r.IntN(11)])
		case 4:
			body = append(body, body[at:]...)
		case 5:
			for i := range body[at:] {
				body[at+i] = byte(r.Uint32())
			}
		}
	}
	return string(body)
}

func TestMalformedBodiesAreTheClientsFault(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.start(`{"type":"external","params":{"task_id":"a"}}`)
		good := map[string]string{
			"/api/sse/callback":             apiConnect("t", "/api/sse/tasks?task_id=a"),
			"/api/tasks":                    `{"type":"demo","params":{"steps":1,"message":"m"}}`,
			"/api/tasks/{task_id}/progress": `{"text":"t","value":0.5}`,
			"/api/tasks/{task_id}/complete": `{"result":{"a":["b",1,null]}}`,
			"/api/tasks/{task_id}/fail":     `{"error":"e"}`,
			"/api/deployments/version":      `{"request_id":"r","version":"1","changelog":"c"}`,
		}
		routes := apiRoutes(t, "POST")
		r := rand.New(rand.NewPCG(1, 2))
		for range 1000 {
			route := routes[r.IntN(len(routes))][1]
			id := "a"
			if good[route] == "" { // it takes no body, so the ID is wrong instead
				id = "unknown"
			}
			body := apiMalformed(r, cmp.Or(good[route], "{}"))
			if strings.HasSuffix(route, "/fail") && !utf8.ValidString(body) {
				continue // may be a failure nevertheless
			}
			got := api.do("POST", strings.Replace(route, "{task_id}", id, 1), body)
			if !regexp.MustCompile(`^4\d\d \{"error":".+"\}$`).MatchString(got) {
				t.Errorf("POST %s %q: got %s, want 4xx", route, body, got)
			}
		}
		api.follow("a").checkStory("connection_open task_started")
		if got := len(api.version.streams); got != 0 {
			t.Errorf("got %d version streams, want none", got)
		}
	})
}

func TestCommands(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args           string
		code           int
		stdout, stderr string
	}{
		{"version", 0, "sidecast " + buildVersion() + "\n", ""},
		{"help", 0, usage, ""},
		{"-h", 0, usage, ""},
		{"-help", 0, usage, ""},
		{"--help", 0, usage, ""},
		{"start", 2, "", usage},
		{"version now", 2, "", usage},
	} {
		var stdout, stderr strings.Builder
		code := run(t.Context(), strings.Fields(tt.args), getenvFrom(nil), &stdout, &stderr)
		if code != tt.code || stdout.String() != tt.stdout || stderr.String() != tt.stderr {
			t.Errorf("%s: got %d, stdout %q, stderr %q\nwant %d, %q, %q",
				tt.args, code, &stdout, &stderr, tt.code, tt.stdout, tt.stderr)
		}
	}
}

// Whoever deploys should see every mistake at the first try, and nothing else: nothing is started that could log.
func TestBadConfigurationStartsNothing(t *testing.T) {
	t.Parallel()
	env := map[string]string{
		"ADDR": "localhost", "TASK_MAX_WORKERS": "0", // backend
		"PORT": "http", "INTERNAL_ADDR": "3001", // gateway
		"MAX_CONNECTIONS": "-1", "LOG_LEVEL": "loud", // both
	}
	for args, want := range map[string][]string{
		"":        {"ADDR", "TASK_MAX_WORKERS", "INTERNAL_ADDR", "MAX_CONNECTIONS", "LOG_LEVEL"},
		"gateway": {"INTERNAL_ADDR", "MAX_CONNECTIONS", "PORT", "LOG_LEVEL"},
	} {
		var stderr strings.Builder
		code := run(t.Context(), strings.Fields(args), getenvFrom(env), io.Discard, &stderr)
		var got []string
		for line := range strings.Lines(stderr.String()) {
			name, _, _ := strings.Cut(line, " must be ")
			got = append(got, name)
		}
		if fmt.Sprint(got) != fmt.Sprint(want) || code != 1 {
			t.Errorf("sidecast %s: got %d and %q, want 1 and a line for each of %v", args, code, &stderr, want)
		}
	}
}

func TestTakenAddress(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer taken.Close()
	env := getenvFrom(map[string]string{"ADDR": taken.Addr().String(), "INTERNAL_ADDR": taken.Addr().String(), "PORT": "0"})
	for _, args := range [][]string{nil, {"gateway"}} {
		var stderr strings.Builder
		got := run(t.Context(), args, env, io.Discard, &stderr)
		if got != 1 || !strings.Contains(stderr.String(), "address already in use") {
			t.Errorf("sidecast %v: got %d and %q, want 1 and the reason", args, got, &stderr)
		}
	}
}

// startRun runs the program in this process and waits until it listens. stop does what SIGTERM does, and returns the
// exit code.
func startRun(t testing.TB, args []string, env map[string]string) (addr string, output *testOutput, stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	code := make(chan int, 1)
	output = &testOutput{}
	go func() { code <- run(ctx, args, getenvFrom(env), io.Discard, output) }()
	stop = sync.OnceValue(func() int {
		cancel()
		return <-code
	})
	t.Cleanup(func() {
		if stop(); t.Failed() {
			t.Logf("output of sidecast %v:\n%s", args, output)
		}
	})
	started := regexp.MustCompile(`msg=started url=http://\S*:(\d+)`)
	eventually(t, patience, "started", func() bool { return started.MatchString(output.String()) })
	return "127.0.0.1:" + started.FindStringSubmatch(output.String())[1], output, stop
}

// However the program is run, it becomes ready by its own health check, and ends without an error when it is told to.
func TestRunUntilStopped(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { silent.Close() })
	for _, tt := range []struct {
		name     string
		args     []string
		settings string
	}{
		{"embedded", nil, "ADDR=127.0.0.1:0"},
		{"split", nil, "ADDR=127.0.0.1:0 SSE_GATEWAY_URL=http://127.0.0.1:1"},
		// The readiness of the backend does not depend on the gateway's.
		{"silent gateway", nil, "ADDR=127.0.0.1:0 SSE_GATEWAY_URL=http://" + silent.Addr().String()},
		{"gateway", []string{"gateway"}, "PORT=0 CALLBACK_URL=http://127.0.0.1:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			addr, output, stop := startRun(t, tt.args, settingsEnv(tt.settings))
			if took := time.Since(began); took > sendLimit-time.Second {
				t.Errorf("started after %v, which is too close to %v", took, sendLimit)
			}
			own := map[string]string{"ADDR": addr}
			if got := run(t.Context(), []string{"healthcheck"}, getenvFrom(own), io.Discard, output); got != 0 {
				t.Errorf("healthcheck: got %d, want 0", got)
			}
			if got := stop(); got != 0 {
				t.Errorf("exit code: got %d, want 0", got)
			}
		})
	}
}

func TestHealthcheckFails(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	server := serveTest(t, api.handler)
	api.stop(t.Context())
	addr := server.Listener.Addr().String()
	check := func(addr, want string) {
		t.Helper()
		var stderr strings.Builder
		code := run(t.Context(), []string{"healthcheck"}, getenvFrom(map[string]string{"ADDR": addr}), io.Discard, &stderr)
		if code != 1 || !strings.Contains(stderr.String(), want) {
			t.Errorf("got %d and %q, want 1 and %q", code, &stderr, want)
		}
	}
	check(addr, "http://"+addr+"/readyz: answered 503")
	elsewhere := serveTest(t, http.RedirectHandler("/healthz", http.StatusFound))
	check(elsewhere.Listener.Addr().String(), "/readyz: answered 302")
	check(fmt.Sprintf("127.0.0.1:%d", freePort(t)), "connection refused")
	check("localhost", "ADDR must be host:port")
}

// The program can be built and reviewed with nothing but Go.
func TestNoDependencies(t *testing.T) {
	t.Parallel()
	if mod := edited(t, "go.mod"); regexp.MustCompile(`(?m)^\s*(require|replace|tool)\b`).MatchString(mod) {
		t.Errorf("go.mod: got %q, want no require", mod)
	}
	files, err := filepath.Glob("*.go")
	must(t, err)
	for _, name := range files {
		file, err := goparser.ParseFile(token.NewFileSet(), name, nil, goparser.ImportsOnly)
		must(t, err)
		for _, spec := range file.Imports {
			// Only paths of the standard library have a first element without a dot.
			path, _ := strconv.Unquote(spec.Path.Value)
			if first, _, _ := strings.Cut(path, "/"); strings.Contains(first, ".") {
				t.Errorf("%s imports %s", name, path)
			}
		}
	}
}

// Otherwise a page could make its own name point at this machine, be of the same site, and start and cancel tasks.
func TestDevelopmentServesThisMachineOnly(t *testing.T) {
	t.Parallel()
	const refused = `403 {"error":"request to another host","code":"other_host"}`
	for settings, hosts := range map[string]struct{ served, refused string }{
		"":                 {"localhost LOCALHOST:8080 127.0.0.1 127.8.9.1:80 [::1]:8080 [::1]", "evil.test localhost.evil.test 10.0.0.1 ::2"},
		"ADDR=10.0.0.1:80": {"localhost 10.0.0.1 10.0.0.1:80", "evil.test 10.0.0.2"},
		"ADDR=app.test:80": {"localhost App.test app.test:8080", "evil.test"},
		"ADDR=:80":         {"localhost 10.0.0.1:80 [fe80::1]:80", "evil.test"},
		"ADDR=0.0.0.0:80":  {"localhost 10.0.0.1:80", "evil.test"},
		"APP_ENV=production ADDR=:80 API_TOKEN=0123456789abcdef": {"localhost evil.test 10.0.0.1", ""},
	} {
		api := newAPI(t, settings)
		for host := range strings.FieldsSeq(hosts.served) {
			api.check("GET", "/healthz", "", `200 {"status":"ok"}`, "Host: "+host)
		}
		for host := range strings.FieldsSeq(hosts.refused) {
			for _, request := range []string{"GET /healthz", "POST /api/tasks", "GET /", "GET /api/sse/tasks"} {
				method, target, _ := strings.Cut(request, " ")
				api.check(method, target, `{"type":"demo"}`, refused, "Host: "+host)
			}
		}
		if hosts.refused != "" && !strings.Contains(api.logged.String(), `msg="refusing a request to another host`) {
			t.Errorf("%s: no line in the log", settings)
		}
	}
}

func TestStartSaysWhatIsOpen(t *testing.T) {
	t.Parallel()
	for settings, want := range map[string]string{
		"":                     "",
		"ADDR=127.0.0.1:80":    "",
		"ADDR=[::1]:80":        "",
		"ADDR=:80":             "API_TOKEN",
		"ADDR=10.0.0.1:80":     "API_TOKEN",
		"ADDR=:80 API_TOKEN=a": "",
		"ADDR=:80 API_TOKEN=a SSE_GATEWAY_URL=http://g":                       "SSE_CALLBACK_SECRET",
		"ADDR=:80 API_TOKEN=a SSE_GATEWAY_URL=http://g SSE_CALLBACK_SECRET=b": "",
	} {
		cfg, err := loadBackendConfig(getenvFrom(settingsEnv(settings)))
		if got := cfg.exposed(); err != nil || !strings.Contains(got, want) || (want == "") != (got == "") {
			t.Errorf("%s: got %q, %v, want %q in it", settings, got, err, want)
		}
	}
}

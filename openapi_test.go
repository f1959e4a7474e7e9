package main

import (
	"cmp"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"maps"
	"mime"
	"net/http"
	"net/http/httptest"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// These tests check that openapi.yaml and the program agree. They know only the YAML that this file uses, and do not
// check that it is valid OpenAPI.

// An apiOperation is what the file says about one method on one path.
type apiOperation struct {
	name    string           // such as "GET /api/sse/tasks"
	query   string           // of the example parameter, such as "?task_id=import-7"
	request *apiBody         // its mediaType is "" if there is none
	answers map[int]*apiBody // by status
}

// An apiBody is what the file says about the body of a request or an answer.
type apiBody struct {
	mediaType string
	examples  map[string]string // by name; a single "example:" has the name ""
}

var (
	yamlKey   = regexp.MustCompile(`^( *)"?([^\s":]+)"?:(?: \{\$ref: "#/components/responses/(\w+)"\})?`)
	yamlQuery = regexp.MustCompile(`\{name: (\w+), in: query, .* example: "(.+)"\}`)
	yamlMedia = regexp.MustCompile(`(?:^ +|content: \{)(\w+/[\w-]+):`)
	yamlText  = regexp.MustCompile(`^ +example: \|\+$`)                  // the indented lines below are the example
	yamlJSON  = regexp.MustCompile(`(?:(\w+): \{value|example): (\{.*)`) // may continue below
)

// readOpenAPI returns the operations in openapi.yaml, by name. It knows where a line belongs by the keys above it, one
// for each level of indentation.
func readOpenAPI(t *testing.T) map[string]*apiOperation {
	t.Helper()
	file := edited(t, "openapi.yaml")
	operations, answers := map[string]*apiOperation{}, map[string]*apiBody{}
	var keys []string
	var op *apiOperation
	at := &apiBody{examples: map[string]string{}} // the body that examples belong to
	enter := func(name string) *apiBody {         // an answer that may have been referred to before
		at = cmp.Or(answers[name], &apiBody{examples: map[string]string{}})
		answers[name] = at
		return at
	}
	for rest := file; rest != ""; {
		line, below, _ := strings.Cut(rest, "\n")
		if m := yamlKey.FindStringSubmatch(line); m != nil {
			depth := len(m[1]) / 2
			keys = append(keys[:min(len(keys), depth)], m[2])
			switch {
			case depth == 2 && keys[0] == "paths" && m[2] != "parameters":
				name := strings.ToUpper(m[2]) + " " + keys[1]
				op = &apiOperation{name: name, request: enter(name), answers: map[int]*apiBody{}}
				operations[name] = op
			case depth == 4 && keys[0] == "paths" && keys[3] == "responses":
				status, _ := strconv.Atoi(m[2])
				op.answers[status] = enter(cmp.Or(m[3], op.name+" "+m[2]))
			case depth == 2 && keys[1] == "responses":
				enter(m[2])
			}
		}
		if m := yamlQuery.FindStringSubmatch(line); m != nil {
			op.query = "?" + m[1] + "=" + m[2]
		}
		if m := yamlMedia.FindStringSubmatch(line); m != nil {
			at.mediaType = m[1]
		}
		if yamlText.MatchString(line) {
			indent := below[:len(below)-len(strings.TrimLeft(below, " "))]
			for line := range strings.Lines(below) {
				text, ok := strings.CutPrefix(line, indent)
				if !ok && text != "\n" {
					break
				}
				at.examples[""] += text
			}
		} else if m := yamlJSON.FindStringSubmatch(line); m != nil {
			var example json.RawMessage
			if err := json.NewDecoder(strings.NewReader(m[2] + "\n" + below)).Decode(&example); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			at.examples[m[1]] = string(example)
		}
		rest = below
	}
	return operations
}

func TestOpenAPI(t *testing.T) {
	operations := readOpenAPI(t)
	for name, test := range map[string]func(*testing.T, map[string]*apiOperation){
		"routes":   testAPIRoutes,
		"examples": testAPIExamples,
		"streams":  testAPIStreams,
		"errors":   testAPIErrors,
		"codes":    testAPICodes,
		"events":   testAPIEvents,
	} {
		t.Run(name, func(t *testing.T) { test(t, operations) })
	}
}

// testAPIRoutes tests that each route is an operation, and each operation has a route.
func testAPIRoutes(t *testing.T, operations map[string]*apiOperation) {
	var want []string
	for _, pattern := range literalArgs(t, "main.go", "(b *backend) routes", "mux.Handle|mux.HandleFunc") {
		want = append(want, strings.TrimSuffix(pattern, "{$}"))
	}
	for _, path := range literalArgs(t, "callback.go", "route", "underPath") {
		want = append(want, "GET "+path) // below /api/sse/ the callback decides which paths are streams
	}
	slices.Sort(want)
	got := slices.Sorted(maps.Keys(operations))
	if !slices.Equal(got, want) {
		t.Errorf("openapi.yaml has\n%s\nand the program\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// literalArgs returns the string literals that a function passes to callees. A call without one fails the test.
func literalArgs(t *testing.T, file, function, callees string) (found []string) {
	t.Helper()
	_, body, _ := strings.Cut(edited(t, file), "\nfunc "+function+"(")
	body, _, _ = strings.Cut(body, "\n}\n")
	for _, m := range regexp.MustCompile(`\b(?:`+callees+`)\([^"\n]*(?:"(.*?)")?`).FindAllStringSubmatch(body, -1) {
		if m[1] == "" {
			t.Errorf("%s: no string literal in %s", file, m[0])
		}
		found = append(found, m[1])
	}
	return found
}

const (
	apiSecret = "correct-horse-battery"
	apiTask   = "import-7"
)

// serveAPI serves a backend with a gateway, as one process would.
func serveAPI(t *testing.T, appEnv string) (b *backend, url string) {
	t.Helper()
	cfg, err := loadBackendConfig(getenvFrom(settingsEnv("APP_ENV=" + appEnv + " API_TOKEN=" + apiSecret + " SSE_CALLBACK_SECRET=" + apiSecret)))
	must(t, err)
	public := httptest.NewUnstartedServer(nil)
	url = "http://" + public.Listener.Addr().String()
	cfg.Gateway.CallbackURL = secret(url + "/api/sse/callback?secret=" + apiSecret)
	log, reg := slog.New(slog.DiscardHandler), newRegistry("test")
	g := newGateway(cfg.Gateway, log, reg)
	internal := httptest.NewServer(internalRoutes(g, reg))
	b = newBackend(cfg, internal.URL, reg, log)
	public.Config.Handler = b.routes(g)
	public.Start()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
		defer cancel()
		b.stop(ctx)
		g.shutdown(ctx)
		public.Config.Close() // not public.Close, which waits half a second after a 413
		internal.Config.Close()
	})
	return b, url
}

// An apiRequest can still be changed before it is sent.
type apiRequest struct {
	method, target, body string
	header               http.Header
}

// example returns an authorized request with one of the operation's examples.
func (op *apiOperation) example(name string) apiRequest {
	method, path, _ := strings.Cut(op.name, " ")
	target := strings.Replace(path, "{task_id}", apiTask, 1) + op.query
	r := apiRequest{method, target, op.request.examples[name], http.Header{}}
	r.header.Set("Authorization", "Bearer "+apiSecret)
	if op.request.mediaType != "" {
		r.header.Set("Content-Type", op.request.mediaType)
	}
	if op.name == "POST /api/sse/callback" {
		r.target += "?secret=" + apiSecret
	}
	return r
}

// exampleNames returns the names of the examples of the request, or just "" if there are none.
func (op *apiOperation) exampleNames() []string {
	if len(op.request.examples) == 0 {
		return []string{""}
	}
	return slices.Sorted(maps.Keys(op.request.examples))
}

// send sends the request and returns the answer, with its body if that is JSON.
func (r apiRequest) send(t *testing.T, url string) (status int, mediaType, text string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), r.method, url+r.target, strings.NewReader(r.body))
	must(t, err)
	req.Header = r.header
	client := http.Client{Timeout: 10 * time.Second}
	resp, err := client.Do(req)
	must(t, err)
	defer resp.Body.Close()
	mediaType, _, _ = mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if mediaType == "application/json" {
		all, err := io.ReadAll(resp.Body)
		must(t, err)
		text = string(all)
	}
	return resp.StatusCode, mediaType, text
}

// startAPITask starts the external task that the examples are about.
func startAPITask(t *testing.T, operations map[string]*apiOperation, url string) {
	t.Helper()
	if status, _, text := operations["POST /api/tasks"].example("external").send(t, url); status != http.StatusAccepted {
		t.Fatalf("starting the task: %d %s", status, text)
	}
}

// apiShape returns a JSON text without its values: objects with their names, arrays, and nil for everything else.
func apiShape(t *testing.T, text string) any {
	t.Helper()
	var strip func(v any) any
	strip = func(v any) any {
		switch v := v.(type) {
		case map[string]any:
			for name := range v {
				v[name] = strip(v[name])
			}
			return v
		case []any:
			for i := range v {
				v[i] = strip(v[i])
			}
			return v
		}
		return nil
	}
	return strip(jsonValue(t, text))
}

// testAPIExamples tests that each example of a request succeeds, and that the answer has exactly the fields of its own
// example. A request without a body counts as one example.
func testAPIExamples(t *testing.T, operations map[string]*apiOperation) {
	for name, op := range operations {
		for _, example := range op.exampleNames() {
			t.Run(name+" "+example, func(t *testing.T) {
				_, url := serveAPI(t, "development")
				if example != "external" {
					startAPITask(t, operations, url)
				}
				if !strings.HasPrefix(name, "POST ") { // the task of these examples is finished
					operations["POST /api/tasks/{task_id}/complete"].example("").send(t, url)
				}
				status, mediaType, text := op.example(example).send(t, url)
				want := op.answers[status]
				if status/100 != 2 || want == nil || mediaType != want.mediaType {
					t.Fatalf("got %d %s %s, which is not documented", status, mediaType, text)
				}
				if mediaType != "application/json" {
					return
				}
				wantText, ok := want.examples[example]
				if !ok {
					wantText = want.examples[""]
				}
				if got, want := apiShape(t, text), apiShape(t, wantText); !reflect.DeepEqual(got, want) {
					t.Errorf("got %d with the fields %v, want %v", status, got, want)
				}
			})
		}
	}
}

// testAPIStreams tests that each stream has the events of its example, after requests from the other examples.
func testAPIStreams(t *testing.T, operations map[string]*apiOperation) {
	epoch := regexp.MustCompile(`^[a-z2-7]+-`)
	for name, op := range operations {
		stream := op.answers[http.StatusOK]
		if stream == nil || stream.mediaType != "text/event-stream" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			_, url := serveAPI(t, "development")
			startAPITask(t, operations, url)
			operations["POST /api/tasks/{task_id}/progress"].example("").send(t, url)
			operations["POST /api/tasks/{task_id}/complete"].example("").send(t, url)
			operations["POST /api/deployments/version"].example("single").send(t, url)
			want := (&parser{}).feed([]byte(stream.examples[""]))
			got := openEventSource(t, url+op.example("").target).waitFor(t, 5*time.Second, func(got []message) bool {
				return len(got) >= len(want) && len(want) > 0
			})
			for i, want := range want {
				got := got[i]
				sameID := epoch.ReplaceAllString(got.ID, "") == epoch.ReplaceAllString(want.ID, "")
				if got.Name != want.Name || !sameID || !reflect.DeepEqual(apiShape(t, got.Data), apiShape(t, want.Data)) {
					t.Errorf("event %d: got %v, want one like %v", i, got, want)
				}
			}
		})
	}
}

// testAPIErrors tries each operation with requests that are each wrong in one way. A status must be documented if, and
// only if, an operation answers with it, and every error must be one of its examples.
func testAPIErrors(t *testing.T, operations map[string]*apiOperation) {
	wrongs := []struct {
		status int
		make   func(b *backend, r *apiRequest)
	}{
		{http.StatusBadRequest, func(b *backend, r *apiRequest) {
			if id := "/" + apiTask; r.body == "" && strings.Contains(r.target, id) {
				r.target = strings.Replace(r.target, id, strings.ReplaceAll(id, "-", "%2D"), 1)
			} else {
				r.body = "[]"
			}
		}},
		{http.StatusUnauthorized, func(b *backend, r *apiRequest) {
			r.header.Del("Authorization")
			r.target, _, _ = strings.Cut(r.target, "?secret=")
		}},
		{http.StatusForbidden, func(b *backend, r *apiRequest) { r.header.Set("Sec-Fetch-Site", "cross-site") }},
		{http.StatusNotFound, func(b *backend, r *apiRequest) {
			r.target = strings.Replace(r.target, apiTask, "other", 1)
		}},
		{http.StatusGone, func(b *backend, r *apiRequest) {
			r.header.Set("Last-Event-ID", closeID)
			r.body = strings.Replace(r.body, "k3v7aq2c-2", closeID, 1)
		}},
		{http.StatusRequestEntityTooLarge, func(b *backend, r *apiRequest) {
			if r.body != "" {
				r.body = strings.Repeat(" ", maxFailBody) + r.body
			}
		}},
		{http.StatusRequestURITooLong, func(b *backend, r *apiRequest) {
			r.target = strings.Replace(r.target+"?", "?", "?a="+strings.Repeat("a", 8<<10)+"&", 1)
		}},
		{http.StatusRequestHeaderFieldsTooLarge, func(b *backend, r *apiRequest) {
			r.header.Set("User-Agent", strings.Repeat(`"`, 10<<10)) // twice as long in JSON
		}},
		{http.StatusUnsupportedMediaType, func(b *backend, r *apiRequest) { r.header.Set("Content-Type", "text/plain") }},
		{http.StatusConflict, func(b *backend, r *apiRequest) { // whatever earlier examples did to the task
			b.tasks.Cancel(apiTask)
			b.tasks.Delete(apiTask)
			b.tasks.Start(externalTask, object{"task_id": marshal(apiTask), "title": marshal("Nightly import")})
			b.tasks.Cancel(apiTask)
		}},
		{http.StatusServiceUnavailable, func(b *backend, r *apiRequest) { b.closing.Store(true) }}, // last: it stays
	}
	for name, op := range operations {
		t.Run(name, func(t *testing.T) {
			b, url := serveAPI(t, "production")
			startAPITask(t, operations, url)
			tried := map[int]bool{http.StatusGatewayTimeout: true} // would take callbackLimit
			for _, wrong := range wrongs {
				given := false
				for _, example := range op.exampleNames() {
					r := op.example(example)
					wrong.make(b, &r)
					status, mediaType, text := r.send(t, url)
					if status < 400 {
						continue // not wrong for this operation
					}
					given = given || status == wrong.status
					if want := op.answers[status]; want == nil || mediaType != want.mediaType || !want.hasExample(text) {
						t.Errorf("wrong for %d: got %d %s, which is not documented", wrong.status, status, text)
					}
				}
				if documented := op.answers[wrong.status] != nil; documented != given {
					t.Errorf("%d is documented: %v, given: %v", wrong.status, documented, given)
				}
				tried[wrong.status] = true
			}
			for status := range op.answers {
				if status >= 400 && !tried[status] {
					t.Errorf("%d is documented, but no request here gets it", status)
				}
			}
		})
	}
}

// hasExample reports whether a JSON text is an example, apart from white space.
func (b *apiBody) hasExample(text string) bool {
	var got, want any
	json.Unmarshal([]byte(text), &got)
	for _, example := range b.examples {
		json.Unmarshal([]byte(example), &want)
		if reflect.DeepEqual(got, want) {
			return true
		}
	}
	return false
}

// testAPICodes tests that the codes of errors in the source are those that the file lists.
func testAPICodes(t *testing.T, _ map[string]*apiOperation) {
	codes := map[string]bool{"not_found": true, "method_not_allowed": true} // jsonErrors makes these from statuses
	call := regexp.MustCompile(`(?:newError\([^,()]+|badRequest\()(?:, )?(\S+?),`)
	for _, name := range productFiles(t) {
		for _, m := range call.FindAllStringSubmatch(edited(t, name), -1) {
			if code, err := strconv.Unquote(m[1]); err == nil && code != "" {
				codes[code] = true
			} else if err != nil && m[1] != "code" && !strings.HasPrefix(m[1], "strings.ReplaceAll(") {
				t.Errorf("%s: the code is not a literal in %s", name, m[0])
			}
		}
	}
	file := edited(t, "openapi.yaml")
	_, list, _ := strings.Cut(file, "\n        code:\n          enum:\n")
	var got []string
	for line := range strings.Lines(list) {
		code, ok := strings.CutPrefix(line, "            - ")
		if !ok {
			break
		}
		got = append(got, strings.TrimSpace(code))
	}
	if want := slices.Sorted(maps.Keys(codes)); !slices.Equal(got, want) {
		t.Errorf("openapi.yaml lists\n%v\nand the program has\n%v", got, want)
	}
}

// An apiSchema is a schema, with only the keywords that the schemas of events use.
type apiSchema struct {
	Type             string
	Const            any
	Enum             []any
	Minimum, Maximum *float64
	Required         []string
	Properties       map[string]*apiSchema
}

// fits reports whether a value is as described. An object with a member that is not described does not fit.
func (s *apiSchema) fits(v any) bool {
	kind := map[string]reflect.Kind{"object": reflect.Map, "string": reflect.String, "number": reflect.Float64}[s.Type]
	switch {
	case s.Const != nil && v != s.Const, s.Enum != nil && !slices.Contains(s.Enum, v), s.Type == "null" && v != nil:
		return false
	case kind != reflect.Invalid && (v == nil || reflect.TypeOf(v).Kind() != kind):
		return false
	}
	if n, ok := v.(float64); ok && (s.Minimum != nil && n < *s.Minimum || s.Maximum != nil && n > *s.Maximum) {
		return false
	}
	members, ok := v.(map[string]any)
	if !ok || s.Type != "object" {
		return true
	}
	for _, name := range s.Required {
		if _, ok := members[name]; !ok {
			return false
		}
	}
	for name, member := range members {
		if s.Properties[name] == nil || !s.Properties[name].fits(member) {
			return false
		}
	}
	return true
}

// testAPIEvents tests that the data of every event is as the file describes it.
func testAPIEvents(t *testing.T, _ map[string]*apiOperation) {
	file := edited(t, "openapi.yaml")
	schema := func(name string) (s apiSchema) {
		_, text, ok := strings.Cut(file, "\n    "+name+": ")
		if err := json.NewDecoder(strings.NewReader(text)).Decode(&s); !ok || err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return s
	}
	api := newAPI(t, "")
	var streams []*apiStream
	for _, end := range []string{`complete {"result":{"rows":42}}`, `fail {"error":"no luck"}`, `cancel `} {
		id := api.start(`{"type":"external"}`)
		streams = append(streams, api.follow(id))
		api.post(id+"/progress", `{"text":"half","value":0.5}`)
		route, body, _ := strings.Cut(end, " ")
		api.post(id+"/"+route, body)
	}
	api.checkAnnounced("r", "1", false)
	api.do("POST", "/api/deployments/version", `{"version":"2","changelog":"x"}`)
	streams = append(streams, api.subscribe("r"), api.follow("unknown"))
	api.conns.Drain(t.Context())
	names := map[string]string{"connection_open": "ConnectionOpen", "connection_close": "ConnectionClose", "version": "Version",
		"error": "TaskNotFound", "task_started": "TaskStarted", "progress_update": "ProgressUpdate",
		"task_completed": "TaskCompleted", "task_failed": "TaskFailed", "task_cancelled": "TaskCancelled"}
	seen := map[string]bool{}
	for _, stream := range streams {
		for _, e := range stream.events() {
			var data map[string]any
			must(t, json.Unmarshal([]byte(e.Data), &data))
			kind, _ := data["event_type"].(string)
			kind = cmp.Or(kind, e.Name)
			seen[kind] = true
			if s := schema(names[kind]); !s.fits(data) || s.fits(map[string]any{}) {
				t.Errorf("%s %s is not as described", names[kind], e.Data)
			}
		}
	}
	if len(seen) != len(names) {
		t.Errorf("got events %v, want each of %v", seen, names)
	}
	if s := schema("Heartbeat"); !s.fits(15.0) || s.fits("15") {
		t.Error("a heartbeat is not a number")
	}
}

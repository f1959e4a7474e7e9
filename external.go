// External tasks, whose work is done elsewhere and reported over HTTP: how they begin, their reports, and the handlers
// for these. What happens to a task is in tasks.go.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// externalTask is the kind of task whose work is done elsewhere and reported over HTTP.
const externalTask = "external"

// plainChars are the characters that a chosen task_id may have: those that need no escape in the path of a URL, so that
// every proxy sees the same path.
const plainChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,;=@"

var (
	errBadTaskID = badRequest("bad_id", "task_id must be 1 to 128 of A-Z a-z 0-9 - . _ ~ ! $ & ' ( ) * + , ; = @, and neither . nor ..")
	errBadValue  = badRequest("bad_value", "value must be a number from 0 to 1")
	errBadSeq    = badRequest("bad_seq", "seq must be a whole number from 1")
	errNoReport  = badRequest("missing_field", "text or value must be there")
)

func isTaskID(id string) bool {
	return len(id) <= maxID && strings.Trim(id, plainChars) == "" && id != "" && id != "." && id != ".."
}

// startExternal is Start for an external task. Its params are {"task_id":"…","title":"…"}, both optional.
func (s *TaskService) startExternal(params object) (t *task, known bool, err error) {
	id, given, err := params.str("task_id")
	switch {
	case err != nil:
		return nil, false, badParam("task_id must be a string")
	case !given:
		id = newToken()
	case !isTaskID(id):
		return nil, false, errBadTaskID
	}
	title, err := textParam(params, "title", "")
	if err != nil {
		return nil, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if t = s.tasks[id]; t != nil && s.life.Err() == nil {
		if t.kind != externalTask || t.title != title || t.status.finished() {
			return nil, false, t.conflict(*errTaskIDTaken)
		}
		return t, true, nil
	}
	if s.outside >= maxExternal {
		return nil, false, errQueueFull
	}
	t = &task{id: id, kind: externalTask, title: title}
	if err := s.addLocked(t); err != nil {
		return nil, false, err
	}
	s.outside++
	s.startLocked(t, "worker lost")
	return t, false, nil
}

// report is what a worker says of its progress. What is nil stays as it was.
type report struct {
	text  *string
	value *float64
	seq   uint64 // numbers the reports of a worker from 1; 0 for none
}

// parseReport reads {"text":"…","value":0.5,"seq":1}. An error is an *apiError.
func parseReport(body []byte) (r report, err error) {
	var text, value, seq []byte
	if err := pick(body, member{"text", &text, nil}, member{"value", &value, nil}, member{"seq", &seq, nil}); err != nil {
		return r, err
	}
	if text != nil {
		said, err := parseString(text)
		if err != nil {
			return r, badParam("text must be a string")
		}
		said = truncate(said)
		r.text = &said
	}
	if value != nil && string(value) != "null" {
		value, err := parseNumber(value)
		if err != nil || value > 1.01 { // above 1 by rounding is taken as 1; more is probably a percentage
			return r, errBadValue
		}
		r.value = &value
	}
	if seq != nil {
		if r.seq, err = strconv.ParseUint(string(seq), 10, 64); err != nil || r.seq == 0 {
			return r, errBadSeq
		}
	}
	if r.text == nil && r.value == nil {
		return r, errNoReport
	}
	return r, nil
}

// Progress applies a report to a running external task.
func (s *TaskService) Progress(id string, r report) (reported, error) {
	a, err := s.takeProgress(s.task(id), r)
	return a, cmp.Or(a.stored.wait(), err)
}

func (s *TaskService) takeProgress(t *task, r report) (reported, error) {
	taken := func() bool { return r.seq != 0 && r.seq <= t.seq }
	return s.take(t, taken, func() {
		t.seq = max(t.seq, r.seq)
		s.reportLocked(t, r)
	})
}

// End ends a running external task: completed with a result as compactResult returns it, or failed with a text as
// usableFailure returns it.
func (s *TaskService) End(id string, status taskStatus, outcome string) (reported, error) {
	t := s.task(id)
	taken := func() bool { return t.status == status && cmp.Or(t.result, t.err) == outcome } // t has one of the two
	a, err := s.take(t, taken, func() { s.finishLocked(t, status, outcome) })
	a.Repeated = false // which only the answer to progress tells
	return a, cmp.Or(a.stored.wait(), err)
}

// reported is the answer to a report: the ID of the event that tells the followers.
type reported struct {
	EventID  string `json:"event_id"`
	Repeated bool   `json:"repeated,omitempty"`
	Reports  *int   `json:"reports,omitempty"` // of a body with one on each line

	stored *commit // waited for before the answer, also with an error, as that tells what became of the task
}

// take calls apply, with mu held, if t is an external task that has not ended, unless taken says that t has this report
// already: the worker may have missed the answer.
func (s *TaskService) take(t *task, taken func() bool, apply func()) (a reported, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t == nil || s.tasks[t.id] != t {
		return a, errTaskUnknown
	}
	a.stored = t.lastStored.Load()
	isTaken := t.kind == externalTask && taken()
	switch {
	case t.kind != externalTask:
		return a, t.conflict(*errNotExternal)
	case t.status == taskCancelled && !isTaken:
		return a, t.conflict(*errTaskCancelled)
	case t.status.finished() && !isTaken:
		return a, t.conflict(*errTaskFinished)
	case !t.status.finished():
		t.lastReport = time.Now()
		t.deadline.Reset(s.cfg.timeout)
	}
	if !isTaken {
		apply()
	}
	return reported{EventID: t.events.id(t.lastEvent), Repeated: isTaken, stored: t.lastStored.Load()}, nil
}

// heard notes a sign of life: a worker has reported, or somebody else has asked something of its task, and was refused.
func (s *TaskService) heard(id string) {
	s.take(s.task(id), func() bool { return true }, nil)
}

// conflict returns an error with the status of t.
func (t *task) conflict(e apiError) error {
	e.TaskStatus = string(t.status)
	return &e
}

// serveProgress is POST /api/tasks/{task_id}/progress.
func (s *TaskService) serveProgress(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	if hasMediaType(r, ndjson) {
		return s.serveReports(w, r)
	}
	body, err := readTyped(w, r, maxTaskBody)
	if err != nil {
		return 0, nil, err
	}
	return s.report(r.PathValue("task_id"), body)
}

// report carries out the body of a single report.
func (s *TaskService) report(id string, body []byte) (status int, answer any, err error) {
	said, err := parseReport(body)
	if err == nil {
		answer, err = s.Progress(id, said)
	}
	return http.StatusOK, answer, err
}

// reportedTask returns the ID in the plain path of a report, or "" if the path is another.
func reportedTask(path []byte) string {
	rest, isTask := bytes.CutPrefix(path, []byte("/api/tasks/"))
	id, isReport := bytes.CutSuffix(rest, []byte("/progress"))
	if !isTask || !isReport || !isTaskID(string(id)) {
		return ""
	}
	return string(id)
}

// lineReader reads a body that may go on for as long as its task does.
type lineReader struct {
	body    io.Reader
	ctx     context.Context // ends with the task
	timeout time.Duration   // for each Read; longer than that of the task
	control *http.ResponseController
}

func (l *lineReader) Read(b []byte) (int, error) {
	l.control.SetReadDeadline(time.Now().Add(l.timeout))
	if err := l.ctx.Err(); err != nil { // looked at after SetReadDeadline, as the end of ctx sets a deadline, too
		return 0, err
	}
	return l.body.Read(b)
}

// answerLimit bounds the writing of the answer to such a body. The server's own limit counts from the start of the
// request.
const answerLimit = 30 * time.Second

// serveReports is serveProgress for a body with a report on each line. Each is taken as it comes; the answer at the end
// of the body acknowledges them.
func (s *TaskService) serveReports(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	t, ctx, err := s.followWorker(r.PathValue("task_id"))
	if err != nil {
		return 0, nil, err
	}
	control := http.NewResponseController(w)
	defer context.AfterFunc(ctx, func() { control.SetReadDeadline(time.Now()) })()
	defer func() { control.SetWriteDeadline(time.Now().Add(answerLimit)) }()
	body := &lineReader{body: r.Body, ctx: ctx, timeout: s.cfg.timeout + time.Second, control: control}
	all, err := s.takeLines(t, body)
	return http.StatusOK, all, cmp.Or(all.stored.wait(), err)
}

// followWorker returns an external task, and a context that ends with it or with the service. For a task that has ended
// it ends with the service: reports may still be repeated.
func (s *TaskService) followWorker(id string) (t *task, ctx context.Context, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t = s.tasks[id]
	switch {
	case t == nil:
		return nil, nil, errTaskUnknown
	case t.kind != externalTask:
		return nil, nil, t.conflict(*errNotExternal)
	case !t.status.finished() && t.worker == nil:
		t.worker, t.cancel = context.WithCancel(s.life)
	}
	return t, cmp.Or(t.worker, s.life), nil
}

// maxUnstored bounds the reports of a body that are not on disk yet: at most twice as many are not.
const maxUnstored = 1000

// takeLines takes the reports of a body until it ends, one is bad, or the task ends.
func (s *TaskService) takeLines(t *task, body *lineReader) (all reported, err error) {
	all = reported{EventID: t.events.id(t.events.stats().last), Reports: new(int)}
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, maxTaskBody+len("\r\n"))
	lines.Split(func(data []byte, atEnd bool) (advance int, token []byte, err error) {
		return bufio.ScanLines(data, atEnd && lines.Err() == nil) // after an error the last line may lack its end
	})
	var before *commit
	n := 0
	for body.ctx.Err() == nil && lines.Scan() {
		n++
		line := bytes.Trim(lines.Bytes(), " \t\r") // the white space of JSON
		if len(line) == 0 {
			continue
		}
		said, err := parseReport(line)
		if len(line) > maxTaskBody {
			err = errBodyTooLarge
		}
		if err != nil {
			return all, atLine(err, n)
		}
		one, err := s.takeProgress(t, said)
		all.stored = one.stored
		if err != nil {
			return all, err
		}
		all.EventID = one.EventID
		*all.Reports++
		if *all.Reports%maxUnstored == 0 {
			if err := before.wait(); err != nil {
				return all, err
			}
			before = all.stored
		}
	}
	switch err := lines.Err(); {
	case body.ctx.Err() != nil && s.life.Err() == nil: // take says how the task has ended
		return s.take(t, func() bool { return false }, func() {})
	case s.life.Err() != nil:
		e := *errClosing
		e.Reports = all.Reports
		return all, &e
	case errors.Is(err, bufio.ErrTooLong):
		return all, atLine(errBodyTooLarge, n+1)
	case err != nil:
		return all, unreadable(err)
	}
	return all, nil
}

// atLine adds the number of a line to an error of parseReport.
func atLine(err error, line int) error {
	e := *err.(*apiError)
	e.Line = line
	return &e
}

// serveComplete is POST /api/tasks/{task_id}/complete.
func (s *TaskService) serveComplete(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	body, err := readJSON(w, r, maxTaskBody)
	result, bad := compactResult(body["result"])
	if err := cmp.Or(err, bad); err != nil {
		return 0, nil, err
	}
	answer, err = s.End(r.PathValue("task_id"), taskCompleted, result)
	return http.StatusOK, answer, err
}

// serveFail is POST /api/tasks/{task_id}/fail. It takes a failure whatever its text is.
func (s *TaskService) serveFail(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	text, err := readTyped(w, r, maxFailBody)
	body, bad := parseObject(bytes.ToValidUTF8(text, []byte("\uFFFD")))
	if err := cmp.Or(err, bad); err != nil {
		return 0, nil, err
	}
	failure, _, _ := body.str("error")
	answer, err = s.End(r.PathValue("task_id"), taskFailed, usableFailure(failure))
	return http.StatusOK, answer, err
}

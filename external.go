// External tasks, which are worked on elsewhere and reported over HTTP: how they begin, their reports, and the handlers
// of these. What happens to a task is in tasks.go.

package main

import (
	"math"
	"net/http"
	"strings"
	"time"
)

// externalTask is the kind of task that is worked on elsewhere and reported over HTTP.
const externalTask = "external"

// plainChars are those that a chosen task_id may have: what stands in the path of a URL as it is, so that whoever looks
// at that path sees the same task.
const plainChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,;=@"

var (
	errBadTaskID = badRequest("bad_id", "task_id must be 1 to 128 of A-Z a-z 0-9 - . _ ~ ! $ & ' ( ) * + , ; = @, and neither . nor ..")
	errBadValue  = badRequest("bad_value", "value must be a number from 0 to 1")
	errBadSeq    = badRequest("bad_seq", "seq must be a whole number from 1")
	errNoReport  = badRequest("missing_field", "text or value must be there")
)

// externalParams reads {"task_id":"…","title":"…"}, both optional.
func externalParams(params object) (id, title string, err error) {
	id, given, err := params.str("task_id")
	if err != nil {
		return "", "", badParam("task_id must be a string")
	}
	if !given {
		id = newToken()
	} else if len(id) > maxID || strings.Trim(id, plainChars) != "" || id == "" || id == "." || id == ".." {
		return "", "", errBadTaskID
	}
	title, _, err = params.str("title")
	if err != nil || len(title) > maxTaskText {
		return "", "", badParam("title must be a string of at most %d bytes", maxTaskText)
	}
	return id, title, nil
}

func (s *TaskService) startExternal(params object) (t *task, known bool, err error) {
	id, title, err := externalParams(params)
	if err != nil {
		return nil, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if t = s.tasks[id]; t != nil && !s.closing {
		if t.kind != externalTask || t.title != title || t.status.finished() {
			return nil, false, t.conflict(errTaskIDTaken)
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
	s.runLocked(t, "worker lost")
	return t, false, nil
}

// report is what is said of a task's progress. What is nil stays as it was.
type report struct {
	text  *string
	value *float64
	seq   uint64 // counts the reports of a worker from 1; 0 for none
}

// parseReport reads {"text":"…","value":0.5,"seq":1}.
func parseReport(body object) (r report, err error) {
	said, ok, err := body.str("text")
	if err != nil {
		return r, badParam("text must be a string")
	}
	if ok {
		said = truncate(said)
		r.text = &said
	}
	if raw, ok := body["value"]; ok && string(raw) != "null" {
		value, err := parseNumber(raw)
		if err != nil || value > 1.01 { // a percentage; sums of floats are above 1 by less
			return r, errBadValue
		}
		r.value = &value
	}
	if raw, ok := body["seq"]; ok {
		seq, err := parseNumber(raw)
		if err != nil || seq < 1 || seq > 1<<53 || seq != math.Trunc(seq) {
			return r, errBadSeq
		}
		r.seq = uint64(seq)
	}
	if r.text == nil && r.value == nil {
		return r, errNoReport
	}
	return r, nil
}

// Progress, Complete and Fail are the reports of an external worker. They return the ID of the event that tells the
// followers. One that was taken before, and whose answer may have been lost, is not taken again.
func (s *TaskService) Progress(id string, r report) (eventID string, repeated bool, err error) {
	return s.report(id, func(t *task) bool { return r.seq != 0 && r.seq <= t.seq }, func(t *task) {
		t.seq = max(t.seq, r.seq)
		s.reportLocked(t, r)
	})
}

// Complete takes a result as compactResult returns it.
func (s *TaskService) Complete(id, result string) (eventID string, err error) {
	eventID, _, err = s.report(id, func(t *task) bool { return t.status == taskCompleted && t.result == result },
		func(t *task) { s.finishLocked(t, taskCompleted, result, "") })
	return eventID, err
}

// Fail takes a text as usableFailure returns it.
func (s *TaskService) Fail(id, failure string) (eventID string, err error) {
	eventID, _, err = s.report(id, func(t *task) bool { return t.status == taskFailed && t.err == failure },
		func(t *task) { s.finishLocked(t, taskFailed, "", failure) })
	return eventID, err
}

// report applies a report to a running external task, under mu, unless the task has taken it before.
func (s *TaskService) report(id string, taken func(*task) bool, apply func(*task)) (eventID string, repeated bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tasks[id]
	switch {
	case t == nil:
		return "", false, errTaskUnknown
	case t.kind != externalTask:
		return "", false, t.conflict(errNotExternal)
	case taken(t):
		repeated = true
	case t.status == taskCancelled:
		return "", false, t.conflict(errTaskCancelled)
	case t.status.finished():
		return "", false, t.conflict(errTaskFinished)
	}
	if !t.status.finished() {
		t.seen = time.Now()
		t.deadline.Reset(s.cfg.timeout)
	}
	if !repeated {
		apply(t)
	}
	return t.outbox.id(t.last), repeated, nil
}

// serveProgress is POST /api/tasks/{task_id}/progress.
func (s *TaskService) serveProgress(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	body, err := readJSON(w, r, maxTaskBody)
	if err != nil {
		return 0, nil, err
	}
	report, err := parseReport(body)
	if err != nil {
		return 0, nil, err
	}
	eventID, repeated, err := s.Progress(r.PathValue("task_id"), report)
	return http.StatusOK, reported{eventID, repeated}, err
}

// serveComplete is POST /api/tasks/{task_id}/complete.
func (s *TaskService) serveComplete(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	body, err := readJSON(w, r, maxTaskBody)
	if err != nil {
		return 0, nil, err
	}
	result, err := compactResult(body["result"])
	if err != nil {
		return 0, nil, err
	}
	eventID, err := s.Complete(r.PathValue("task_id"), result)
	return http.StatusOK, reported{EventID: eventID}, err
}

// serveFail is POST /api/tasks/{task_id}/fail. No failure is lost over its text.
func (s *TaskService) serveFail(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	body, err := readJSON(w, r, maxFailBody)
	if err != nil {
		return 0, nil, err
	}
	failure, _, _ := body.str("error")
	eventID, err := s.Fail(r.PathValue("task_id"), usableFailure(failure))
	return http.StatusOK, reported{EventID: eventID}, err
}

// reported is the answer to a report.
type reported struct {
	EventID  string `json:"event_id"`
	Repeated bool   `json:"repeated,omitempty"`
}
